-- Posts the lines of a file one after the other, over and over. Arguments: the file, and where to write a JSON summary.
-- Sums up what wrk measured; every answer that is not a 200 counts as failed.
local bodies, next_body = {}, 0
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  for line in io.lines(args[1]) do
    table.insert(bodies, line)
  end
  -- Threads start at different lines, so that they do not send the same texts together.
  next_body = math.random(#bodies)
  failed = 0 -- global: `done` reads it through thread:get
end

function request()
  next_body = next_body % #bodies + 1
  return wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, bodies[next_body])
end

function response(status)
  if status ~= 200 then
    failed = failed + 1
  end
end

function done(summary, latency)
  local refused = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  for _, thread in ipairs(threads) do
    refused = refused + thread:get("failed")
  end
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "failed": %d, "p50_ms": %.3f, "p99_ms": %.3f}\n',
    summary.requests, summary.duration / 1e6, refused, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
