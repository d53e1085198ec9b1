-- One short chat call, over and over; the result as one line of JSON at the end. The key comes from the environment.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
wrk.body = '{"model": "short", "max_tokens": 50, "messages": ['
  .. '{"role": "system", "content": "You are a helpful assistant."}, '
  .. '{"role": "user", "content": "What is the capital of France, and how many people live there?"}]}'

done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"calls": %d, "failed": %d, "p50_us": %d, "p99_us": %d}\n',
    summary.requests,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50),
    latency:percentile(99)
  ))
end
