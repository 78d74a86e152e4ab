// What the kernels share. No header of the toolkit is needed: numbers of 16 bits are handled as their bits, so that the same
// source is also compiled for the CPU, where `scripts/cuda_on_cpu` runs it.
#pragma once

struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

// To the nearest, ties to even; NaN stays NaN.
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{(unsigned short)((bits >> 16) | 0x40u)};
    return bf16{(unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// The value of an IEEE number of 16 bits.
__device__ __forceinline__ float half_to_float(unsigned bits) {
    unsigned sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 0) {
        float value = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    exponent = exponent == 31 ? 255 : exponent + 112;
    return __uint_as_float(sign | exponent << 23 | mantissa << 13);
}

// Sixteen bytes, which are read and written at once.
template <typename T>
struct alignas(16) Packet {
    static constexpr int N = 16 / sizeof(T);
    T values[N];
};

__device__ __forceinline__ bool is_wide(const void* pointer) { return ((unsigned long long)pointer & 15u) == 0; }

// `N` neighbours, of which only `count` are there; the others read as zero. At once where the address allows it.
template <typename T, int N>
__device__ __forceinline__ void load(float (&out)[N], const T* from, int count) {
    constexpr int P = Packet<T>::N;
    static_assert(N % P == 0, "whole packets");
    if (count >= N && is_wide(from)) {
#pragma unroll
        for (int p = 0; p < N / P; p++) {
            Packet<T> packet = reinterpret_cast<const Packet<T>*>(from)[p];
#pragma unroll
            for (int i = 0; i < P; i++) out[p * P + i] = to_float(packet.values[i]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = i < count ? to_float(from[i]) : 0.0f;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const float (&values)[N], int count) {
    constexpr int P = Packet<T>::N;
    static_assert(N % P == 0, "whole packets");
    if (count >= N && is_wide(to)) {
#pragma unroll
        for (int p = 0; p < N / P; p++) {
            Packet<T> packet;
#pragma unroll
            for (int i = 0; i < P; i++) packet.values[i] = from_float<T>(values[p * P + i]);
            reinterpret_cast<Packet<T>*>(to)[p] = packet;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i < count) to[i] = from_float<T>(values[i]);
    }
}

// Elements that a thread takes at a time: two packets of f32, one of bf16.
constexpr int LANES = 8;

constexpr float INFINITY_F = __builtin_huge_valf();
constexpr unsigned ALL = 0xffffffffu;
constexpr int WARP = 32;

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2) x += __shfl_xor_sync(ALL, x, other);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, other));
    return x;
}

// Scores and logits `z` become `c tanh(z / c)`.
__device__ __forceinline__ float capped(float z, float cap) { return cap > 0.0f ? cap * tanhf(z / cap) : z; }

// Over the threads of `threadIdx.x`, whole warps of them; every thread gets the result. In a fixed order, so that a result is
// the same however often it is computed. Where `blockDim.x` is one warp, rows of a block may end at different times.
template <typename T>
__device__ T block_sum(T x) {
    x = warp_sum(x);
    if (blockDim.x == WARP) return x;
    __shared__ T sums[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? sums[lane] : T(0));
}

__device__ __forceinline__ float block_max(float x) {
    x = warp_max(x);
    if (blockDim.x == WARP) return x;
    __shared__ float largest[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) largest[warp] = x;
    __syncthreads();
    return warp_max(lane < blockDim.x / WARP ? largest[lane] : -INFINITY_F);
}
