// What all kernels share. No headers: the run-time compiler has none. Compiled with -fmad=false, so that every fused
// multiply-add is one that is written, and a value has the same bits in whichever kernel it is computed.
//
// Vectors that enter a product come in blocks of 32 values, two blocks a "pair". Value k of a pair lies where the
// tensor core's B operand wants it: lane t of four has the bytes 16 t .. 16 t + 15, first of block 0, then of block 1.

#define ALL 0xffffffffu
#define INF __int_as_float(0x7f800000)
#define BLOCK_TOKENS 32
#define SPAN 128

DEV float bf16_to_float(u16 h) { return __int_as_float((u32)h << 16); }
DEV float low_half(u32 v) { return half_to_float((u16)v); }
DEV float high_half(u32 v) { return half_to_float((u16)(v >> 16)); }

DEV float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = __fadd_rn(v, __shfl_xor_sync(ALL, v, o));
    return v;
}

// Inputs of a product: rows of `pairs` pairs.
struct Acts {
    u8 *q;          // signed bytes, [row][pair][64]
    float *d;       // [row][2 pairs]: scale of a block of bytes
    float *totals;  // [row][2 pairs]: that times their sum
    u16 *h;         // halves, [row][pair][64]
    float *hd;      // [row][2 pairs]: scale of a block of halves (f16 alone has one)
    uint2 *sums;    // [row][pair]: the same as two bf16: both blocks' upper ones, both blocks' lower ones
    float *squares; // [row][blocks]: sum of squares of the residual stream, whose root the product is divided by
    u16 *prompt;    // bf16 for `prompt.cu`: [128 rows][pair][row][64]
};

// Which forms of an input the next product reads.
#define AS_BYTES 1
#define AS_BF16 2
#define AS_F16 4
#define AS_TOTALS 8 // beside bytes
#define AS_SUMS 16  // likewise
#define AS_PROMPT 32

DEV int byte_place(int k) { return ((k & 15) >> 2) * 16 + (k >> 5) * 8 + (k >> 4 & 1) * 4 + (k & 3); }
DEV int half_place(int k) { return ((k & 15) >> 2) * 16 + (k >> 4) * 4 + (k & 3); }
// Of value k of a pair in a row of 64 for `prompt.cu`. Sixteen values lie in the order in which a warp has them as operand A;
// eighths of rows are exchanged, so that eight rows' lie in different banks.
DEV int prompt_place(int row, int k) { return (((k >> 4) * 2 + (k >> 1 & 1)) ^ (row & 7)) * 8 + (k >> 2 & 3) * 2 + (k & 1); }

// Stores a block of 32 values, one a lane, as the input of a product. Scales of bytes have 12 significant bits, so that
// a scale times a sum of 32 bytes is exact.
template <int FORMS>
DEV void store_block(const Acts &out, int row, int pairs, int block, float v) {
    const int lane = threadIdx.x & 31, k = (block & 1) * 32 + lane;
    const long long pair = (long long)row * pairs + (block >> 1);
    const u32 top = FORMS & (AS_BYTES | AS_F16) ? __reduce_max_sync(ALL, __float_as_uint(v) & 0x7fffffffu) : 0;
    if (FORMS & AS_BYTES) {
        const float d = __uint_as_float((__float_as_uint(__fmul_rn(__uint_as_float(top), 1.0f / 127.0f)) + 0x800u) & ~0xfffu);
        const float inverse = d > 1e-36f ? __fdiv_rn(1.0f, d) : 0.0f;
        int q = __float2int_rn(__fmul_rn(v, inverse));
        q = max(-127, min(127, q));
        const int sum = __reduce_add_sync(ALL, q);
        out.q[pair * 64 + byte_place(k)] = (u8)q;
        if (lane == 0) {
            const float scale = d > 1e-36f ? d : 0.0f;
            const float all = __fmul_rn(scale, (float)sum);
            const u16 high = float_to_bf16(all);
            out.d[pair * 2 + (block & 1)] = scale;
            if (FORMS & AS_TOTALS) out.totals[pair * 2 + (block & 1)] = all;
            if (FORMS & AS_SUMS) {
                u16 *sums = (u16 *)(out.sums + pair) + (block & 1);
                sums[0] = high;
                sums[2] = float_to_bf16(__fsub_rn(all, bf16_to_float(high)));
            }
        }
    }
    if (FORMS & AS_PROMPT)
        out.prompt[((long long)(row >> 7) * pairs + (block >> 1)) * 8192 + (row & 127) * 64 + prompt_place(row, k)] = float_to_bf16(v);
    if (FORMS & AS_BF16) out.h[pair * 64 + half_place(k)] = float_to_bf16(v);
    if (FORMS & AS_F16) {
        // a power of two that brings the largest value to 2^14 .. 2^15
        const int e = max(-100, min(100, (int)(top >> 23) - 127 - 14));
        out.h[pair * 64 + half_place(k)] = float_to_half(__fmul_rn(v, __int_as_float((127 - e) << 23)));
        if (lane == 0) out.hd[pair * 2 + (block & 1)] = __int_as_float((127 + e) << 23);
    }
}

// The residual stream as the input of a step that normalises by the root mean square: multiplied by the norm's gain, not
// yet divided by the root, which is a factor of whole rows.
template <int FORMS>
DEV void store_residual(const Acts &out, int row, int pairs, int blocks, int block, float x, float gain) {
    const float squares = warp_sum(__fmul_rn(x, x));
    if ((threadIdx.x & 31) == 0) out.squares[(long long)row * blocks + block] = squares;
    store_block<FORMS>(out, row, pairs, block, __fmul_rn(x, gain));
}

#ifdef PAIRS_BY_WARPS
// The same as `multiply_pair` of sm_90a, where each warp multiplies for itself.
template <int NT> DEV void multiply_pair(float (&c)[NT][4], const u32 (&a)[4][4], const u8 *stage) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const u8 *row = stage + (n * 8 + g) * 128 + t * 4;
            const u32 b0 = *(const u32 *)(row + (2 * s ^ g) * 16), b1 = *(const u32 *)(row + ((2 * s + 1) ^ g) * 16);
            mma_bf16(c[n], make_uint4(a[s][0], a[s][1], a[s][2], a[s][3]), b0, b1);
        }
}
template <int N> DEV void multiplied() {}
#endif
