// Rotary position embedding of queries and keys in one launch, in Hugging Face's rotate-half form: column `j` of a head and
// column `j + half` are turned by the angle of their row.
#include "common.cuh"

template <typename T>
__device__ void turn(const T* x, T* y, const float* cos, const float* sin, long long item, int heads, int half, float sign) {
    int chunks = (half + LANES - 1) / LANES;
    int column = (int)(item % chunks) * LANES;
    long long head = item / chunks, row = head / heads;
    int count = half - column;
    long long at = head * 2 * half + column, angle = row * half + column;
    float first[LANES], second[LANES], cosines[LANES], sines[LANES];
    load(first, x + at, count);
    load(second, x + at + half, count);
    load(cosines, cos + angle, count);
    load(sines, sin + angle, count);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        float a = first[i], b = second[i], s = sign * sines[i];
        first[i] = a * cosines[i] - b * s;
        second[i] = b * cosines[i] + a * s;
    }
    store(y + at, first, count);
    store(y + at + half, second, count);
}

// `sign` is 1 forward and -1 backward. Of either matrix there may be no row.
template <typename T>
__device__ void rope(const T* q, T* q_out, const float* q_cos, const float* q_sin, int q_rows, int q_heads, const T* k,
                     T* k_out, const float* k_cos, const float* k_sin, int k_rows, int k_heads, int half, float sign) {
    int chunks = (half + LANES - 1) / LANES;
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long of_q = (long long)q_rows * q_heads * chunks, of_k = (long long)k_rows * k_heads * chunks;
    if (item < of_q) {
        turn(q, q_out, q_cos, q_sin, item, q_heads, half, sign);
    } else if (item < of_q + of_k) {
        turn(k, k_out, k_cos, k_sin, item - of_q, k_heads, half, sign);
    }
}

#define ROPE(T, NAME)                                                                                                    \
    extern "C" __global__ void rope_##NAME(const T* q, T* q_out, const float* q_cos, const float* q_sin, int q_rows,     \
                                           int q_heads, const T* k, T* k_out, const float* k_cos, const float* k_sin,    \
                                           int k_rows, int k_heads, int half, float sign) {                              \
        rope(q, q_out, q_cos, q_sin, q_rows, q_heads, k, k_out, k_cos, k_sin, k_rows, k_heads, half, sign);              \
    }
ROPE(float, f32)
ROPE(bf16, bf16)
