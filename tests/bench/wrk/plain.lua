-- The same request each time, with the fewest fields.
dofile("report.lua")
