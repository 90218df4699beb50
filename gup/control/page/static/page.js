// Puts fresh fragments in the place of old ones and draws the charts. Renders no figure itself, asks no other host.
"use strict";
(() => {
  const RETRY_MS = 10_000;
  const zone = document.body.dataset.zone || undefined;

  // --- fragments: the old tree takes over what differs, so focus, selection and open tables stay

  function morph(old, fresh) {
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
      old.replaceWith(fresh.cloneNode(true));
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    for (const { name, value } of [...fresh.attributes]) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !(old.nodeName === "DETAILS" && name === "open")) old.removeAttribute(name);
    }
    morphChildren(old, fresh);
  }

  function morphChildren(old, fresh) {
    const before = [...old.childNodes];
    [...fresh.childNodes].forEach((child, at) => {
      if (at < before.length) morph(before[at], child);
      else old.append(child.cloneNode(true));
    });
    before.slice(fresh.childNodes.length).forEach((child) => child.remove());
  }

  function put({ id, html }) {
    const place = document.getElementById(id);
    if (!place) return;
    const template = document.createElement("template");
    template.innerHTML = html;
    morphChildren(place, template.content);
    if (id === "head") showLive();
    DRAW[id]?.(id);
  }

  // --- events

  let source = null;
  let retry = 0;
  let lost = "waiting";

  function showLive() {
    const live = document.getElementById("live");
    if (!live) return;
    live.hidden = lost === "waiting";
    live.classList.toggle("old", lost !== "");
    live.textContent = lost === "" ? "live" : lost;
  }

  function lose() {
    if (lost === "" || lost === "waiting") lost = `no answer since ${clock("{HH}:{mm}:{ss}")(Date.now() / 1000)}; these figures are old`;
    showLive();
  }

  function listen() {
    clearTimeout(retry);
    if (source || document.hidden) return;
    source = new EventSource("/api/v1/events");
    source.addEventListener("hello", (event) => {
      if (JSON.parse(event.data).edition !== document.body.dataset.edition) location.reload();
    });
    source.addEventListener("figures", () => {
      lost = "";
      showLive();
    });
    source.addEventListener("fragment", (event) => put(JSON.parse(event.data)));
    source.onerror = () => {
      lose();
      if (source.readyState === EventSource.CLOSED) {
        hush();
        retry = setTimeout(listen, RETRY_MS);
      }
    };
  }

  function hush() {
    clearTimeout(retry);
    if (source) source.close();
    source = null;
  }

  // --- charts

  const charts = {};
  const probe = document.body.appendChild(document.createElement("i")); // a canvas takes resolved colours only
  const colour = (name) => () => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const onClocks = (at) => (window.uPlot && zone ? uPlot.tzDate(new Date(at * 1000), zone) : new Date(at * 1000));
  const clock = (form) => {
    const format = window.uPlot ? uPlot.fmtDate(form) : (date) => date.toTimeString().slice(0, 8);
    return (at) => format(onClocks(at));
  };

  function size(bytes) {
    for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
      if (Math.abs(bytes) < 999.5) return `${unit === "B" || bytes >= 100 ? bytes.toFixed(0) : bytes.toFixed(1)} ${unit}`;
      bytes /= 1000;
    }
    return `${bytes.toFixed(1)} PB`;
  }

  const upwards = { range: (_, __, most) => [0, Math.max(most * 1.1, 1000)] };
  const short = (unit) => (_, values) => values.map((value) => (value === null ? "" : size(value).replace(".0 ", " ") + unit));
  const shown = (unit) => (_, value) => (value === null || value === undefined ? "–" : size(value) + unit);

  function axes(form, unit) {
    const stroke = colour("--dim");
    const grid = { stroke: colour("--grid"), width: 1 };
    const ticks = { show: false };
    const font = "12px system-ui, sans-serif";
    const times = clock(form);
    return [
      { stroke, grid: { show: false }, ticks, font, size: 28, space: 64, values: (_, splits) => splits.map(times) },
      { stroke, grid, ticks, font, size: 74, values: short(unit) },
    ];
  }

  // With no pointer over it, the legend tells the newest figures.
  function showLast(chart) {
    if (chart.cursor.idx === null || chart.cursor.idx === undefined) chart.setLegend({ idx: chart.data[0].length - 1 });
  }

  // A point between two gaps makes no line.
  function alone(chart, series) {
    const values = chart.data[series];
    return values.flatMap((value, at) => (value !== null && (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null ? [at] : []));
  }

  function draw(name, options, data) {
    const place = document.querySelector(`[data-chart="${name}"]`);
    if (!window.uPlot || !place) return;
    if (charts[name]) {
      charts[name].setData(data);
      showLast(charts[name]);
      return;
    }
    const box = () => ({ width: place.clientWidth, height: name === "days" ? 180 : matchMedia("(max-width: 40rem)").matches ? 170 : 220 });
    const chart = new uPlot({ legend: { live: true }, ...options, ...box(), tzDate: onClocks }, data, place);
    charts[name] = chart;
    chart.over.addEventListener("mouseleave", () => setTimeout(() => showLast(chart)));
    setTimeout(() => showLast(chart)); // after the chart's own first turn
    new ResizeObserver(() => {
      const { width, height } = box();
      if (width !== chart.width) chart.setSize({ width, height });
    }).observe(place);
  }

  // What was moved in an hour or a day, as the server has added it up; the last figures still grow.
  function drawSpan(name) {
    const told = document.querySelector(`#${name} [data-columns]`);
    if (told) draw(name, lines(), JSON.parse(told.dataset.columns));
  }

  function lines() {
    const dots = { show: true, size: 5, filter: alone };
    return {
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { y: upwards },
      padding: [6, 12, 0, 0],
      axes: axes("{HH}:{mm}", "/s"),
      series: [
        { label: "Time", value: (_, at) => (at === null ? "–" : clock("{HH}:{mm}")(at)) },
        { label: "To clients", stroke: colour("--clients"), fill: colour("--clients-area"), width: 2, points: dots, value: shown("/s") },
        { label: "Over the WAN", stroke: colour("--wan"), fill: colour("--wan-area"), width: 2, points: dots, value: shown("/s") },
        { label: "WAN limit", stroke: colour("--limit"), width: 1.5, dash: [6, 4], points: { show: false }, value: shown("/s") },
      ],
    };
  }

  // From the table behind the chart: there is one set of figures.
  function drawDays() {
    const rows = [...document.querySelectorAll("#days tr[data-day]")].reverse();
    const value = (row, cell) => Number(row.querySelector(`.${cell} data`).value);
    const days = rows.map((row) => Date.parse(`${row.dataset.day}T12:00:00Z`) / 1000);
    if (!days.length || !window.uPlot) return;
    const label = uPlot.fmtDate("{D} {MMM}");
    const text = (at) => label(uPlot.tzDate(new Date(at * 1000), "UTC"));
    const last = days[days.length - 1];
    const [x, y] = axes("{D} {MMM}", "");
    const bars = uPlot.paths.bars({ size: [0.7, 36], radius: 0.15 });
    draw("days", {
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: {
        x: { range: () => [last - 29.5 * 86400, last + 0.5 * 86400] },
        y: upwards,
      },
      axes: [{ ...x, splits: (chart) => Array.from({ length: chart.width < 600 ? 4 : 10 }, (_, at) => last - 86400 * at * (chart.width < 600 ? 8 : 3)), values: (_, at) => at.map(text) }, y],
      series: [
        { label: "Day", value: (_, at) => (at === null ? "–" : text(at)) },
        { label: "To clients", stroke: colour("--clients"), fill: colour("--clients"), paths: bars, points: { show: false }, value: shown("") },
        { label: "Over the WAN", stroke: colour("--wan"), fill: colour("--wan"), paths: bars, points: { show: false }, value: shown("") },
      ],
    }, [days, rows.map((row) => value(row, "sent")), rows.map((row) => value(row, "received"))]);
  }

  // What would have crossed the WAN with stores of other sizes; the present one is marked.
  function drawSizes() {
    const told = document.querySelector("#sizing [data-sizes]");
    if (!told) return;
    const [sizes, wan] = JSON.parse(told.dataset.sizes);
    const present = Number(told.dataset.present);
    const [x, y] = axes("", "");
    const dots = { show: true, size: 6 };
    draw("sizing", {
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false, distr: 3 }, y: upwards },
      padding: [6, 28, 0, 0],
      axes: [{ ...x, values: (_, at) => at.map((value) => (value === null || !/^[125]0*$/.test(String(value)) ? "" : size(value).replace(".0 ", " "))) }, y],
      series: [
        { label: "Size", value: shown("") },
        { label: "Over the WAN", stroke: colour("--wan"), fill: colour("--wan-area"), width: 2, points: dots, value: shown("") },
        { label: "Present size", stroke: colour("--limit"), points: { show: true, size: 11, fill: colour("--limit") }, value: shown("") },
      ],
    }, [sizes, wan, sizes.map((value, at) => (value === present ? wan[at] : null))]);
  }

  const DRAW = { sizing: drawSizes, hour: drawSpan, day: drawSpan, days: drawDays };

  document.addEventListener("visibilitychange", () => (document.hidden ? hush() : listen()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    Object.values(charts).forEach((chart) => chart.redraw(false));
  });
  Object.entries(DRAW).forEach(([name, drawing]) => drawing(name));
  listen();
})();
