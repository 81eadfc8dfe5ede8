// Asynchronous copies to shared memory, in place of CUDA's header. They arrive at the last moment, when they are waited
// for, so that a missing wait gives a wrong result; under ThreadSanitizer at once, so that it sees a copy that comes
// before all threads have read what it replaces.
#pragma once

#include <cstddef>

void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0);
void __pipeline_commit();
void __pipeline_wait_prior(size_t groups);
