"""The wire formats of OpenAI's and Anthropic's APIs: read a request, meter an answer, end a stream.

A request is parsed and checked (`request`, `body`, `restrictions`, `model_names`, `allowance`), and what it may use
at most is estimated from what the model reads of it (`content`, `images`, `estimate`); `pieces` says which calls are
billed by the piece and not in tokens. Its answer is metered event by event, and a stream that reaches a limit is
ended as its own API would end it, so that every SDK accepts the answer. `meter` defines the interface of meters and
endings. Each format of answers (a *surface*) has a module with its meter, its ending and its error event: `chat`,
`responses`, `messages`, `media`, `rerank` (`surfaces` lists them). `texts` finds the model's texts in an answer,
`usage` reads the usage objects of vendors, `reported_error` finds errors in answers of status 200, and `mask` hides
our key in whatever passes. A call that no quota admits gets the error and the headers of its API (`refusal`,
`limit_headers`). What differs between kinds of upstream (OpenAI, Azure, vLLM, …) is in `kinds`.

The package promises:

- The upstream gets what was checked. A request that two parsers could read in two ways is refused.
- Unknown fields are forwarded unchanged. Unknown content is counted, too high rather than too low.
- The client sees the bytes that the upstream sent, without the parts that only the proxy asked for.

It is pure: it never opens a connection, reads a clock, writes a log or tokenizes a text. Time comes as an argument,
and so does the function that counts tokens.

Begin reading at `endpoints` (which paths exist and how each is charged), then `request` (what a request asks for and
what is forwarded), `meter` (what an answer used) and `stream` (what of a stream may pass to the client).
`strict_json`, `multipart` and `sse` parse the syntaxes below them, and `content_encoding` decompresses.
"""
