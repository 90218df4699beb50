-- The targets of a file, one after the other, over each connection: one a line.
dofile("report.lua")
local requests, at = {}, 0

init = function(args)
    for line in io.lines(args[1]) do
        requests[#requests + 1] = wrk.format("GET", line)
    end
end

request = function()
    at = at % #requests + 1
    return requests[at]
end
