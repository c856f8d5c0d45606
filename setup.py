"""The native parts of the distribution; all else of it is in pyproject.toml.

`tmem-guest` has the C library linked in: locked into a guest's memory, it brings along what it uses of that
library and not all of it, and it runs in guests older than the host it was built on. It is a linker's choice,
for one program only. Its target has to be named, or cargo makes the choice for procedural macros, too; the
Python module must not have it.
"""

from setuptools import setup
from setuptools_rust import Binding, RustBin, RustExtension
from setuptools_rust.rustc_info import get_rust_host

setup(
    rust_extensions=[
        RustExtension(
            "tmem_native._native",
            path="native/py/Cargo.toml",
            binding=Binding.PyO3,
            py_limited_api=True,
            debug=False,
        ),
        RustBin(
            "tmem-guest",
            path="native/guest/Cargo.toml",
            args=[
                *("--target", get_rust_host(None)),
                *("--config", 'target."cfg(all())".rustflags = ["-Ctarget-feature=+crt-static"]'),
            ],
            debug=False,
        ),
    ]
)
