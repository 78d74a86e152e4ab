// Frozen matrices out of their blocks, into scratch that cuBLAS multiplies by. The arithmetic is llama.cpp's and bitsandbytes'.
//
// A thread writes eight neighbours of a row. Rows may be some of the matrix (`ids`), and where llama.cpp's converter has put
// the halves of each head of `paired` rows between each other, they come out in Hugging Face's order.
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

template <typename B, typename T>
__device__ void dequantize(const byte* blocks, T* out, const unsigned* ids, int paired, int rows, int columns) {
    int chunks = columns / 8;
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (long long)rows * chunks) return;
    long long row = item / chunks;
    int column = (int)(item % chunks) * 8;
    long long block = source_row(row, ids, paired) * (columns / B::SIZE) + column / B::SIZE;
    float values[8];
    B::eight(blocks + block * B::BYTES, column % B::SIZE, values);
    store(out + row * columns + column, values, 8);
}

__constant__ float NF4[16] = {-1.0f,         -0.6961928f,  -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                              -0.091050036f, 0.0f,         0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                              0.44070983f,   0.562617f,    0.72295684f,  1.0f};

// NF4: two elements a byte, the first in the upper half; 64 elements share a scale, which is `scales[block]`, or where
// `quantized` is given `code[quantized[block]] * scales[block / 256] + offset`.
template <typename T>
__device__ void dequantize_nf4(const byte* packed, const byte* quantized, const float* code, const float* scales,
                               float offset, T* out, const unsigned* ids, int paired, int rows, int columns) {
    // every thread indexes as it likes, which shared memory serves at once
    __shared__ float values_of[16];
    if (threadIdx.x < 16) values_of[threadIdx.x] = NF4[threadIdx.x];
    __syncthreads();
    int chunks = (columns + 7) / 8;
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (long long)rows * chunks) return;
    long long row = item / chunks;
    int column = (int)(item % chunks) * 8, count = columns - column < 8 ? columns - column : 8;
    long long at = source_row(row, ids, paired) * columns + column;
    float values[8];
    if (count == 8 && at % 8 == 0) {
        long long block = at / 64;
        float scale = quantized ? code[quantized[block]] * scales[block / 256] + offset : scales[block];
        unsigned nibbles = *reinterpret_cast<const unsigned*>(packed + at / 2);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = values_of[nibbles >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15] * scale;
    } else {
        for (int i = 0; i < 8; i++) {
            values[i] = 0.0f;
            if (i >= count) continue;
            long long element = at + i, block = element / 64;
            float scale = quantized ? code[quantized[block]] * scales[block / 256] + offset : scales[block];
            values[i] = values_of[packed[element / 2] >> (element % 2 ? 0 : 4) & 15] * scale;
        }
    }
    store(out + row * columns + column, values, count);
}

#define BLOCKS(B, TYPE, T, NAME)                                                                                         \
    extern "C" __global__ void dequantize_##TYPE##_##NAME(const byte* blocks, T* out, const unsigned* ids, int paired,   \
                                                          int rows, int columns) {                                       \
        dequantize<B>(blocks, out, ids, paired, rows, columns);                                                          \
    }
#define DEQUANTIZE(T, NAME)                                                                                              \
    BLOCKS(Q4_0, q4_0, T, NAME)                                                                                          \
    BLOCKS(Q4_1, q4_1, T, NAME)                                                                                          \
    BLOCKS(Q5_0, q5_0, T, NAME)                                                                                          \
    BLOCKS(Q5_1, q5_1, T, NAME)                                                                                          \
    BLOCKS(Q8_0, q8_0, T, NAME)                                                                                          \
    BLOCKS(Q2K, q2_k, T, NAME)                                                                                           \
    BLOCKS(Q3K, q3_k, T, NAME)                                                                                           \
    BLOCKS(Q4K, q4_k, T, NAME)                                                                                           \
    BLOCKS(Q5K, q5_k, T, NAME)                                                                                           \
    BLOCKS(Q6K, q6_k, T, NAME)                                                                                           \
    extern "C" __global__ void dequantize_nf4_##NAME(const byte* packed, const byte* quantized, const float* code,       \
                                                     const float* scales, float offset, T* out, const unsigned* ids,     \
                                                     int paired, int rows, int columns) {                                \
        dequantize_nf4(packed, quantized, code, scales, offset, out, ids, paired, rows, columns);                        \
    }
DEQUANTIZE(float, f32)
DEQUANTIZE(bf16, bf16)
