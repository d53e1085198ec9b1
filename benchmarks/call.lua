-- One short chat call, over and over; the result as one line of JSON at the end. The key comes from the environment, or
-- the keys, which take turns, from a file.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
local before = {}
for number = 1, tonumber(os.getenv("BENCH_PROMPT_BYTES")) / 1333 do
  local role = number % 2 == 1 and "user" or "assistant"
  before[number] = '{"role": "' .. role .. '", "content": "' .. string.rep("The cook peels potatoes. ", 52) .. '"}, '
end
wrk.body = '{"model": "short", "max_tokens": 50, "messages": ['
  .. '{"role": "system", "content": "You are a helpful assistant."}, ' .. table.concat(before)
  .. '{"role": "user", "content": "What is the capital of France, and how many people live there?"}]}'

if os.getenv("BENCH_KEYS") then
  local keys, last = {}, tonumber(os.getenv("BENCH_FIRST"))
  for key in io.lines(os.getenv("BENCH_KEYS")) do keys[#keys + 1] = "Bearer " .. key end
  request = function()
    last = last % #keys + 1
    wrk.headers["Authorization"] = keys[last]
    return wrk.format()
  end
end

done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"calls": %d, "failed": %d, "refused": %d, "p50_us": %d, "p99_us": %d}\n',
    summary.requests,
    errors.connect + errors.read + errors.write + errors.timeout,
    errors.status,
    latency:percentile(50),
    latency:percentile(99)
  ))
end
