-- Ranges of so many bytes at chance places, each at a multiple of its length: args are length and body's length.
dofile("report.lua")
local length, places
local counter = 0

setup = function(thread)
    counter = counter + 1
    thread:set("number", counter)
end

init = function(args)
    length = tonumber(args[1])
    places = math.floor(tonumber(args[2]) / length)
    math.randomseed(number)
end

request = function()
    local start = math.random(0, places - 1) * length
    return wrk.format("GET", nil, { ["Range"] = string.format("bytes=%d-%d", start, start + length - 1) })
end
