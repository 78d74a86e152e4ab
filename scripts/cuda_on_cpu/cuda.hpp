// What a kernel's source takes for granted, for a compiler that makes CPU code of it. Force-included before the source.
//
// The threads of a block are fibers on one system thread. A fiber runs until it waits for others, at __syncthreads or in a
// shuffle; when all of the block, or of the warp, wait, they go on. Blocks run one after the other.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef __global__
#define __global__
#endif
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static

struct Dim {
    unsigned x, y, z;
};
// of the fiber that runs
extern Dim threadIdx, blockIdx, blockDim, gridDim;

void wait_for_block();
// Gives a value to the other lanes of the warp, and returns what lane `lane ^ mask` gave.
uint64_t exchange(uint64_t bits, int mask);

inline void __syncthreads() { wait_for_block(); }

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(bits, mask);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
