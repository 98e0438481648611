"""Builds the CPU kernels where there are a C++ compiler and JAX's headers; without them the package works, only slower."""

from setuptools import Extension, setup

SOURCES = (
    "ops",
    "sampling",
    "transport",
    "collectives",
    "packing",
    "portable",
    "avx2",
    "avx512",
    "vnni",
)  # of code that several emit, the linker keeps the first one's

try:
    from jax.ffi import include_dir
except ImportError:
    extensions = []
else:
    extensions = [
        Extension(
            "workers.kernels.cpu.native",
            [f"workers/kernels/cpu/src/{name}.cc" for name in SOURCES],
            depends=[
                f"workers/kernels/cpu/src/{name}"
                for name in ("kernels.h", "ops.h", "parallel.h", "transport.h", "vector.inc")
            ],
            include_dirs=[include_dir()],
            extra_compile_args=["-std=c++17", "-O3", "-w"],
            language="c++",
            optional=True,
        )
    ]

setup(ext_modules=extensions)
