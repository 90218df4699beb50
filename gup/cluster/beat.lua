-- One beat of one node: what it tells the others, what they have told, and its share of the WAN's rate.
--
-- KEYS: member zset (name, last beat in ms), demands hash, grants hash, orders stream
-- ARGV: 1 name, 2 signed row, 3 life of the row in ms, 4 the site's rate in bytes/s (0: no limit),
--       5 demand of urgent content, 6 of other content, 7 of background fetches, each in bytes/s,
--       8 number of the grant in use (0: none), 9 life of a grant in ms, 10 last order seen, 11 most orders,
--       12 time in ms (tests only; "" is the engine's own), 13 the node's start number, 0 while it has none
-- Returns: {time in ms, grant's number, its bytes/s, {name, row, name, row, ...}, {order id, fields, ...}};
--          with the grant's number -1, and nothing done, when a node that started earlier has this name
--
-- A share is never given before those it comes from have let go of it: a node confirms the grant it uses with its
-- next beat, and one that it does not confirm ends with its life. Until then the largest of its grants counts.

local members, demands, grants, orders = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local name, row, life, rate = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local used, grant_life = tonumber(ARGV[8]), tonumber(ARGV[9])
local now = tonumber(ARGV[12])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

-- members

local start, holder = tonumber(ARGV[13] or '0'), redis.call('GET', members .. ':' .. name .. ':start')
if start == 0 or (holder and tonumber(holder) < start) then
  return {now, -1, 0, {}, {}}
end
redis.call('SET', members .. ':' .. name .. ':start', ARGV[13], 'PX', life)
for _, ahead in ipairs(redis.call('ZRANGEBYSCORE', members, '(' .. now, '+inf')) do
  redis.call('ZADD', members, now, ahead) -- the clock was set back
end
redis.call('ZADD', members, now, name)
redis.call('SET', members .. ':' .. name, row, 'PX', life)
redis.call('HSET', demands, name, ARGV[5] .. ' ' .. ARGV[6] .. ' ' .. ARGV[7])
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', members, '-inf', now - life)) do
  redis.call('ZREM', members, gone)
  redis.call('HDEL', demands, gone)
end
local names, rows = redis.call('ZRANGE', members, 0, -1), {}
for _, member in ipairs(names) do
  local found = redis.call('GET', members .. ':' .. member)
  if found then
    rows[#rows + 1] = member
    rows[#rows + 1] = found
  end
end

-- the shares that would be right: equal where wanted, urgent content first

-- Give each what it wants of `left`, and those who want more equal parts of what remains. Returns what is left.
local function pour(wanted, shares, left)
  local order = {}
  for _, member in ipairs(names) do
    if wanted[member] > 0 then order[#order + 1] = member end
  end
  table.sort(order, function(one, other)
    if wanted[one] ~= wanted[other] then return wanted[one] < wanted[other] end
    return one < other
  end)
  for at, member in ipairs(order) do
    local part = math.min(wanted[member], left / (#order - at + 1))
    shares[member] = shares[member] + part
    left = left - part
  end
  return left
end

local shares, wanted, idle, busy = {}, {{}, {}, {}}, {}, {}
for _, member in ipairs(names) do
  local urgent, other, background = string.match(redis.call('HGET', demands, member) or '0 0 0', '(%S+) (%S+) (%S+)')
  wanted[1][member], wanted[2][member], wanted[3][member] = tonumber(urgent), tonumber(other), tonumber(background)
  shares[member] = 0
  local all = wanted[1][member] + wanted[2][member] + wanted[3][member]
  idle[member], busy[member] = all == 0 and rate or 0, all > 0 and rate or 0
end
local kept = 0
for _, member in ipairs(names) do
  if idle[member] > 0 then kept = rate / 100 end
end
pour(idle, shares, kept) -- so that one with nothing can begin at once
local left = rate - kept
for class = 1, 3 do left = pour(wanted[class], shares, left) end
if left > 0 and next(busy) then pour(busy, shares, left) end -- more than wanted: demand is known late

-- the grant: of the right share, what nobody else may still use

local number, elsewhere, own = redis.call('HINCRBY', grants, '#', 1), 0, {}
local all = redis.call('HGETALL', grants)
for at = 1, #all, 2 do
  local holder, largest, live = all[at], 0, {}
  if holder ~= '#' then
    for id, bytes, ends in string.gmatch(all[at + 1], '(%d+):(%d+):(%d+)') do
      id, bytes, ends = tonumber(id), tonumber(bytes), tonumber(ends)
      ends = math.min(ends, now + grant_life) -- the clock may have been set back
      if ends > now and (holder ~= name or used == 0 or id == used) then
        live[#live + 1] = string.format('%d:%d:%d', id, bytes, ends)
        largest = math.max(largest, bytes)
      end
    end
    if holder == name then
      own = live
    elseif #live == 0 then
      redis.call('HDEL', grants, holder)
    else
      redis.call('HSET', grants, holder, table.concat(live, ' '))
      elsewhere = elsewhere + largest
    end
  end
end
local share = math.max(0, math.floor(math.min(shares[name], rate - elsewhere)))
own[#own + 1] = string.format('%d:%d:%d', number, share, now + grant_life)
redis.call('HSET', grants, name, table.concat(own, ' '))

local new = redis.call('XRANGE', orders, '(' .. ARGV[10], '+', 'COUNT', ARGV[11])
return {now, number, share, rows, new}
