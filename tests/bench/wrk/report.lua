-- Told at the end of every run, in a form that tests/bench/measure.py reads.
done = function(summary, latency, requests)
    local e = summary.errors
    io.write(string.format("\nbench requests=%d bytes=%d micros=%d errors=%d\n",
        summary.requests, summary.bytes, summary.duration, e.status + e.connect + e.read + e.write))
end
