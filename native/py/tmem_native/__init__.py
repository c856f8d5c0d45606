"""The native engine, as Python knows it.

`Engine` is what `tmemd` runs; the `encode_*` and `decode_*` functions are the codec of control connections;
`Store` is the page store without transports, for tests. Page data never becomes a Python object on the paths
of the product.
"""

from tmem_native._native import (
    HEADER_BYTES,
    MAX_BATCH,
    MAX_BODY_BYTES,
    PAGE_BYTES,
    PORT,
    VERSION,
    Engine,
    EngineError,
    Store,
    decode_header,
    decode_hello_answer,
    decode_hello_request,
    decode_notice,
    decode_stats,
    encode_header,
    encode_hello_answer,
    encode_hello_request,
    encode_notice,
    encode_report,
    latency_bounds,
    log_to_stderr,
    run_keeper,
)

__all__ = [
    "HEADER_BYTES",
    "MAX_BATCH",
    "MAX_BODY_BYTES",
    "PAGE_BYTES",
    "PORT",
    "VERSION",
    "Engine",
    "EngineError",
    "Store",
    "decode_header",
    "decode_hello_answer",
    "decode_hello_request",
    "decode_notice",
    "decode_stats",
    "encode_header",
    "encode_hello_answer",
    "encode_hello_request",
    "encode_notice",
    "encode_report",
    "latency_bounds",
    "log_to_stderr",
    "run_keeper",
]
