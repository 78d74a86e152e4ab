// Blocks that frozen matrices are kept in. The arithmetic is llama.cpp's and bitsandbytes'.
#pragma once
#include "common.cuh"

typedef unsigned char byte;

__device__ __forceinline__ unsigned two_bytes(const byte* at) { return at[0] | (unsigned)at[1] << 8; }
__device__ __forceinline__ float half_at(const byte* at) { return half_to_float(two_bytes(at)); }

// Where row `row` of the result stands in the matrix.
__device__ __forceinline__ long long source_row(long long row, const unsigned* ids, int paired) {
    if (ids) row = ids[row];
    if (paired == 0) return row;
    long long head = row / paired;
    int within = (int)(row % paired), half = paired / 2;
    return head * paired + 2 * (within % half) + within / half;
}

// Each type: elements and bytes of a block, and the eight elements from `at` on, a multiple of eight.
struct Q4_0 {
    static constexpr int SIZE = 32, BYTES = 18;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        float d = half_at(block);
        const byte* q = block + 2 + at % 16;
        int shift = at / 16 * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)((int)(q[i] >> shift & 15) - 8);
    }
};

struct Q4_1 {
    static constexpr int SIZE = 32, BYTES = 20;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        float d = half_at(block), m = half_at(block + 2);
        const byte* q = block + 4 + at % 16;
        int shift = at / 16 * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)(q[i] >> shift & 15) + m;
    }
};

struct Q5_0 {
    static constexpr int SIZE = 32, BYTES = 22;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        float d = half_at(block);
        unsigned fifth = block[2 + at / 8];
        const byte* q = block + 6 + at % 16;
        int shift = at / 16 * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)((int)((q[i] >> shift & 15) | (fifth >> i & 1) << 4) - 16);
    }
};

struct Q5_1 {
    static constexpr int SIZE = 32, BYTES = 24;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        float d = half_at(block), m = half_at(block + 2);
        unsigned fifth = block[4 + at / 8];
        const byte* q = block + 8 + at % 16;
        int shift = at / 16 * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)((q[i] >> shift & 15) | (fifth >> i & 1) << 4) + m;
    }
};

struct Q8_0 {
    static constexpr int SIZE = 32, BYTES = 34;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        float d = half_at(block);
        const signed char* q = reinterpret_cast<const signed char*>(block + 2 + at);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)q[i];
    }
};

// In blocks of 256, element `at` belongs to half `at / 128`, within that to quarter `at % 128 / 32`.
struct Q2K {
    static constexpr int SIZE = 256, BYTES = 84;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        int half = at / 128, quarter = at % 128 / 32, l = at % 32;
        unsigned scale = block[at / 16];
        float d = half_at(block + 80) * (float)(scale & 15), m = half_at(block + 82) * (float)(scale >> 4);
        const byte* q = block + 16 + half * 32 + l;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)(q[i] >> 2 * quarter & 3) - m;
    }
};

struct Q3K {
    static constexpr int SIZE = 256, BYTES = 110;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        int half = at / 128, quarter = at % 128 / 32, l = at % 32, s = at / 16;
        const byte* scales = block + 96;
        int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4, high = scales[8 + s % 4] >> 2 * (s / 4) & 3;
        float d = half_at(block + 108) * (float)((low | high << 4) - 32);
        const byte *q = block + 32 + half * 32 + l, *third = block + l;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int less = third[i] >> (half * 4 + quarter) & 1 ? 0 : 4;
            out[i] = d * (float)((int)(q[i] >> 2 * quarter & 3) - less);
        }
    }
};

// Scale and minimum number `s` of eight, six bits each.
__device__ __forceinline__ void six_bits(const byte* scales, int s, unsigned& scale, unsigned& minimum) {
    if (s < 4) {
        scale = scales[s] & 63;
        minimum = scales[s + 4] & 63;
    } else {
        scale = (scales[s + 4] & 15) | (unsigned)(scales[s - 4] >> 6) << 4;
        minimum = scales[s + 4] >> 4 | (unsigned)(scales[s] >> 6) << 4;
    }
}

struct Q4K {
    static constexpr int SIZE = 256, BYTES = 144;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        unsigned scale, minimum;
        six_bits(block + 4, at / 32, scale, minimum);
        float d = half_at(block) * (float)scale, m = half_at(block + 2) * (float)minimum;
        const byte* q = block + 16 + at / 64 * 32 + at % 32;
        int shift = at / 32 % 2 * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)(q[i] >> shift & 15) - m;
    }
};

struct Q5K {
    static constexpr int SIZE = 256, BYTES = 176;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        unsigned scale, minimum;
        six_bits(block + 4, at / 32, scale, minimum);
        float d = half_at(block) * (float)scale, m = half_at(block + 2) * (float)minimum;
        const byte *q = block + 48 + at / 64 * 32 + at % 32, *fifth = block + 16 + at % 32;
        int shift = at / 32 % 2 * 4, bit = at / 32;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = d * (float)((q[i] >> shift & 15) | (fifth[i] >> bit & 1) << 4) - m;
    }
};

struct Q6K {
    static constexpr int SIZE = 256, BYTES = 210;
    static __device__ __forceinline__ void eight(const byte* block, int at, float (&out)[8]) {
        int half = at / 128, quarter = at % 128 / 32, l = at % 32;
        float d = half_at(block + 208) * (float)(signed char)block[192 + at / 16];
        const byte *low = block + half * 64 + quarter % 2 * 32 + l, *high = block + 128 + half * 32 + l;
        int shift = quarter / 2 * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int q = (low[i] >> shift & 15) | (high[i] >> 2 * quarter & 3) << 4;
            out[i] = d * (float)(q - 32);
        }
    }
};

__constant__ float NF4[16] = {-1.0f,         -0.6961928f,  -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                              -0.091050036f, 0.0f,         0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                              0.44070983f,   0.562617f,    0.72295684f,  1.0f};

// All of a warp, or more threads, call it first: indices are every thread's own, which shared memory serves at once.
__device__ __forceinline__ const float* nf4_values() {
    __shared__ float values[16];
    if (threadIdx.x < 16) values[threadIdx.x] = NF4[threadIdx.x];
    __syncthreads();
    return values;
}

// NF4: two elements a byte, the first in the upper half; 64 elements share a scale, which is `scales[block]`, or where
// `quantized` is given `code[quantized[block]] * scales[block / 256] + offset`.
struct Nf4 {
    const byte* packed;
    const byte* quantized;
    const float* code;
    const float* scales;
    float offset;

    __device__ __forceinline__ float scale(long long block) const {
        return quantized ? code[quantized[block]] * scales[block / 256] + offset : scales[block];
    }

    // Element `at` and those after it, `count` of eight; the others are zero. `values_of` is what `nf4_values` gave.
    __device__ __forceinline__ void eight(const float* values_of, long long at, int count, float (&out)[8]) const {
        if (count == 8 && at % 8 == 0) {
            float d = scale(at / 64);
            unsigned nibbles = *reinterpret_cast<const unsigned*>(packed + at / 2);
#pragma unroll
            for (int i = 0; i < 8; i++) out[i] = values_of[nibbles >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15] * d;
            return;
        }
        for (int i = 0; i < 8; i++) {
            out[i] = 0.0f;
            if (i >= count) continue;
            long long element = at + i;
            out[i] = values_of[packed[element / 2] >> (element % 2 ? 0 : 4) & 15] * scale(element / 64);
        }
    }
};

// Each type of block by its name, and of elements `T`, which kernels call `NAME`.
#define FOR_EACH_BLOCK(F, T, NAME)                                                                                       \
    F(Q4_0, q4_0, T, NAME)                                                                                               \
    F(Q4_1, q4_1, T, NAME)                                                                                               \
    F(Q5_0, q5_0, T, NAME)                                                                                               \
    F(Q5_1, q5_1, T, NAME)                                                                                               \
    F(Q8_0, q8_0, T, NAME)                                                                                               \
    F(Q2K, q2_k, T, NAME)                                                                                                \
    F(Q3K, q3_k, T, NAME)                                                                                                \
    F(Q4K, q4_k, T, NAME)                                                                                                \
    F(Q5K, q5_k, T, NAME)                                                                                                \
    F(Q6K, q6_k, T, NAME)
