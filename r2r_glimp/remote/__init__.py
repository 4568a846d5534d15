"""Models behind servers: vLLM, SGLang, `r2r-glimp serve`, any that speaks OpenAI's completions."""
