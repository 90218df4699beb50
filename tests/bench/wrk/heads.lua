-- Six fields, and each request another client's: no two heads are alike.
dofile("report.lua")
local counter = 0
local before, after

setup = function(thread)
    counter = counter + 1
    thread:set("number", counter)
end

init = function(args)
    before = "GET " .. wrk.path .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port ..
        "\r\nAccept: */*\r\nAccept-Language: en-us\r\nCache-Control: no-transform\r\n" ..
        "User-Agent: Endpoint/14.3.4615.2000 (Windows NT 10.0; Win64; client-id "
    after = ")\r\nConnection: Keep-Alive\r\n\r\n"
    math.randomseed(number)
end

request = function()
    return before .. string.format("%08X%08X", math.random(0, 0x7fffffff), math.random(0, 0x7fffffff)) .. after
end
