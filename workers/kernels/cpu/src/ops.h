// What the operations share.
#pragma once
#include "kernels.h"
#include "parallel.h"

namespace ffi = xla::ffi;

#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()

namespace grokmesh {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using S8 = ffi::Buffer<ffi::S8>;
using BF16 = ffi::Buffer<ffi::BF16>;
using Mask = ffi::Buffer<ffi::PRED>;
using Result = ffi::ResultBuffer<ffi::F32>;

// The kernels that all operations compute with.
extern const Kernels* chosen;

}  // namespace grokmesh
