// Products y = W x with what the plan fuses behind them: what kernels for few columns (few.cu) and for many (wide.cu) share.
//
// W lies in tiles of 16 rows by one pair of blocks (64 columns), each as the A operand of the tensor core's integer (or
// half) product. The columns of a tile row are cut into segments, whose sums are added in order. Segments depend on the
// matrix alone, and every kernel does the same arithmetic within one: a column's bits don't depend on how many columns there are.
//
// Integer products start from 1.5 * 2^23, so that their bits are that float plus the sum: no conversion.

// Storage of a matrix.
#define F_Q4_0 0
#define F_Q4_1 1
#define F_Q5_0 2
#define F_Q5_1 3
#define F_Q8_0 4
#define F_Q4_K 5
#define F_Q5_K 6
#define F_Q6_K 7
#define F_Q8_K16 8 // bytes with a small scale for 16 values and a half for 256
#define F_BF16 9
#define F_F16 10
#define F_F32 11 // three bf16 that add up to it

struct Matrix {
    const uint4 *q;   // [tile][pair][words][32 lanes]
    const u32 *high;  // [tile][pair][words][32 lanes]: bits above the fourth
    const uint2 *s;   // [tile][pair][8]: scales of rows g and g + 8; two uint2 where there are minima in halves
    const u32 *super; // [tile][4 pairs][8]: scales of 256 values
    const float *bias;
};

template <int F> struct Format {
    static constexpr bool HALF = F >= F_BF16;
    static constexpr int Q = F == F_F32 ? 12 : HALF ? 4 : (F == F_Q8_0 || F == F_Q8_K16) ? 2 : 1;
    static constexpr int H = (F == F_Q5_0 || F == F_Q5_1 || F == F_Q5_K) ? 1 : F == F_Q6_K ? 2 : 0;
    static constexpr bool K32 = F == F_Q4_K || F == F_Q5_K;
    static constexpr bool K16 = F == F_Q6_K || F == F_Q8_K16;
    static constexpr bool DM = F == F_Q4_1 || F == F_Q5_1;
    static constexpr int S = HALF ? 0 : DM ? 2 : 1;
    static constexpr int SUPER = K32 ? 2 : K16 ? 1 : 0;
    // a minimum, or an offset that acts as one, of every block; those of K32 are products of their own
    static constexpr bool MIN = DM || F == F_Q4_0 || F == F_Q5_0;
};

// A pair of a tile row, as it lies in shared memory.
template <int F> struct Piece {
    using T = Format<F>;
    static constexpr int HIGH = T::Q * 512, S = HIGH + T::H * 128, SUPER = S + T::S * 64, BYTES = SUPER + T::SUPER * 32;

    // The part of one of 32 lanes in copying it.
    static INLINE void copy(u8 *to, const Matrix &m, int tile, int pairs, int pair) {
        const int lane = threadIdx.x & 31;
        const long long at = (long long)tile * pairs + pair;
        auto run = [&](int place, const void *from, int units) {
#pragma unroll
            for (int u = 0; u < units; u += 32)
                if (u + lane < units) copy_async(to + place + (u + lane) * 16, (const u8 *)from + (u + lane) * 16);
        };
        run(0, m.q + at * T::Q * 32, T::Q * 32);
        if (T::H) run(HIGH, m.high + at * T::H * 32, T::H * 8);
        if (T::S) run(S, m.s + at * T::S * 8, T::S * 4);
        if (T::SUPER) run(SUPER, m.super + ((long long)tile * ((pairs + 3) / 4) + pair / 4) * 8 * T::SUPER, T::SUPER * 2);
    }
};

template <int F> struct Tile {
    uint4 q[Format<F>::Q];
    u32 h[Format<F>::H + 1];
    uint2 s[Format<F>::S + 1];
    u32 super[2];

    // From the matrix.
    INLINE void load(const Matrix &m, int tile, int pairs, int pair) {
        using T = Format<F>;
        const int lane = threadIdx.x & 31, g = lane >> 2;
        const long long at = (long long)tile * pairs + pair;
#pragma unroll
        for (int i = 0; i < T::Q; i++) q[i] = stream4(m.q + (at * T::Q + i) * 32 + lane);
#pragma unroll
        for (int i = 0; i < T::H; i++) h[i] = stream1(m.high + (at * T::H + i) * 32 + lane);
        if (T::S == 1) s[0] = stream2(m.s + at * 8 + g);
        if (T::S == 2) {
            const uint4 v = stream4((const uint4 *)m.s + at * 8 + g);
            s[0] = make_uint2(v.x, v.y);
            s[1] = make_uint2(v.z, v.w);
        }
        if (T::SUPER) {
            const long long sat = ((long long)tile * ((pairs + 3) / 4) + pair / 4) * 8 + g;
            if (T::SUPER == 2) {
                const uint2 v = stream2((const uint2 *)m.super + sat);
                super[0] = v.x;
                super[1] = v.y;
            } else {
                super[0] = stream1(m.super + sat);
            }
        }
    }
    // From shared memory.
    INLINE void read(const u8 *piece) {
        using T = Format<F>;
        using P = Piece<F>;
        const int lane = threadIdx.x & 31, g = lane >> 2;
#pragma unroll
        for (int i = 0; i < T::Q; i++) q[i] = *(const uint4 *)(piece + i * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < T::H; i++) h[i] = *(const u32 *)(piece + P::HIGH + i * 128 + lane * 4);
        if (T::S == 1) s[0] = *(const uint2 *)(piece + P::S + g * 8);
        if (T::S == 2) {
            const uint4 v = *(const uint4 *)(piece + P::S + g * 16);
            s[0] = make_uint2(v.x, v.y);
            s[1] = make_uint2(v.z, v.w);
        }
        if (T::SUPER == 1) super[0] = *(const u32 *)(piece + P::SUPER + g * 4);
        if (T::SUPER == 2) {
            const uint2 v = *(const uint2 *)(piece + P::SUPER + g * 8);
            super[0] = v.x;
            super[1] = v.y;
        }
    }
    // Operand A of block b (0 or 1).
    INLINE void operand(int b, u32 a[4]) const {
        using T = Format<F>;
        if (T::Q == 2) {
            const uint4 v = q[b];
            a[0] = v.x; a[1] = v.y; a[2] = v.z; a[3] = v.w;
            return;
        }
        const u32 w0 = b ? q[0].z : q[0].x, w1 = b ? q[0].w : q[0].y;
        a[0] = w0 & 0x0f0f0f0fu;
        a[1] = w1 & 0x0f0f0f0fu;
        a[2] = w0 >> 4 & 0x0f0f0f0fu;
        a[3] = w1 >> 4 & 0x0f0f0f0fu;
        if (T::H == 1) {
#pragma unroll
            for (int r = 0; r < 4; r++) a[r] |= (b ? h[0] >> r : h[0] << (4 - r)) & 0x10101010u;
        }
        if (T::H == 2) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                // six bits with a sign, four times what they are
                const u32 w = r & 1 ? w1 : w0;
                a[r] = (r < 2 ? w << 2 : w >> 2) & 0x3c3c3c3cu | h[b] << (6 - 2 * r) & 0xc0c0c0c0u;
            }
        }
    }
    // Scale and minimum of block b in rows g and g + 8.
    INLINE void scales(int b, float d[2], float m[2]) const {
        using T = Format<F>;
        const u32 v[2] = {s[0].x, s[0].y};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (T::DM) {
                const u32 w = r ? (b ? s[1].y : s[1].x) : (b ? s[0].y : s[0].x);
                d[r] = low_half(w);
                m[r] = high_half(w);
            } else if (T::K32) {
                d[r] = __fmul_rn(low_half(super[r]), (float)(v[r] >> (16 * b) & 255));
                m[r] = __fmul_rn(-high_half(super[r]), (float)(v[r] >> (16 * b + 8) & 255));
            } else if (T::K16) {
                d[r] = r ? high_half(super[0]) : low_half(super[0]);
            } else {
                d[r] = b ? high_half(v[r]) : low_half(v[r]);
                m[r] = __fmul_rn(d[r], F == F_Q4_0 ? -8.0f : -16.0f);
            }
        }
    }
    // The small scale of half j of block b in row g + 8 r.
    INLINE int small(int b, int r, int j) const { return (int)(i8)((r ? s[0].y : s[0].x) >> (16 * b + 8 * j)); }
};

// A pair of an integer tile row, ready to be multiplied: operands of both blocks; scales in rows g and g + 8, for K16 of a
// block's first sixteen values; minima, or scales of the other sixteen.
template <int F> struct Ready {
    u32 a[2][4];
    float d[2][2], m[2][2];

    INLINE void block(const Tile<F> &tile, int b) {
        tile.operand(b, a[b]);
        tile.scales(b, d[b], m[b]);
        if (Format<F>::K16)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                // exact: 11 bits by 8
                const float scale = F == F_Q6_K ? __fmul_rn(d[b][r], 0.25f) : d[b][r];
                d[b][r] = __fmul_rn(scale, (float)tile.small(b, r, 0));
                m[b][r] = __fmul_rn(scale, (float)tile.small(b, r, 1));
            }
    }
};

// The columns of one warp's product, as offsets from the first of its inputs.
template <int NT> struct Columns {
    const u8 *q;         // bytes or halves
    const float *d;      // scales
    const float *totals;
    int q_at[NT];        // of column g
    int d_at[NT][2];     // of columns 2 t and 2 t + 1
    int hi;              // where the second sixteen bytes of a lane's halves lie
};

#define MAGIC 12582912.0f

// The values of both blocks of a pair for both of a lane's columns, [column][block]; BESIDE: those lie next to each other.
template <bool ONE, bool BESIDE> DEV float4 of_both(const float *from, const int (&at)[2]) {
    if (BESIDE) return *(const float4 *)(from + at[0]);
    const float2 a = *(const float2 *)(from + at[0]), b = ONE ? a : *(const float2 *)(from + at[1]);
    return make_float4(a.x, a.y, b.x, b.y);
}

// One pair of MT tile rows of halves by 8 NT columns. ONE: of one column; the others' sums are left as they are. BESIDE:
// columns' scales lie beside each other.
template <int F, int MT, int NT, bool ONE, bool BESIDE>
DEV void multiply_halves(const Tile<F> (&tile)[MT], const Columns<NT> &x, int pair, float (&acc)[MT][NT][4]) {
    using T = Format<F>;
    constexpr int STEP = ONE ? 2 : 1;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const u8 *p = x.q + x.q_at[n] + pair * 128;
        const uint4 lo = *(const uint4 *)p, hi = *(const uint4 *)(p + x.hi);
        if (F == F_F16) {
            const float4 d = of_both<ONE, BESIDE>(x.d + pair * 2, x.d_at[n]);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    float c[4] = {0, 0, 0, 0};
                    const uint4 a0 = tile[m].q[2 * b], a1 = tile[m].q[2 * b + 1], v = b ? hi : lo;
                    mma_f16(c, a0.x, a0.y, a0.z, a0.w, v.x, v.y);
                    mma_f16(c, a1.x, a1.y, a1.z, a1.w, v.z, v.w);
                    const float e[2] = {b ? d.y : d.x, b ? d.w : d.z};
#pragma unroll
                    for (int i = 0; i < 4; i += STEP) acc[m][n][i] = __fmaf_rn(c[i], e[i & 1], acc[m][n][i]);
                }
        } else {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int part = 0; part < T::Q / 4; part++) {
                    mma_bf16(acc[m][n], tile[m].q[part * 4], lo.x, lo.y);
                    mma_bf16(acc[m][n], tile[m].q[part * 4 + 1], lo.z, lo.w);
                    mma_bf16(acc[m][n], tile[m].q[part * 4 + 2], hi.x, hi.y);
                    mma_bf16(acc[m][n], tile[m].q[part * 4 + 3], hi.z, hi.w);
                }
        }
    }
}

// The same of bytes.
template <int F, int MT, int NT, bool ONE, bool BESIDE>
DEV void multiply_bytes(const Ready<F> (&tile)[MT], const Columns<NT> &x, int pair, float (&acc)[MT][NT][4]) {
    using T = Format<F>;
    constexpr int STEP = ONE ? 2 : 1;
    const int magic = __float_as_int(MAGIC);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const uint4 v = *(const uint4 *)(x.q + x.q_at[n] + pair * 64);
        const float4 scales = of_both<ONE, BESIDE>(x.d + pair * 2, x.d_at[n]);
        float4 totals;
        if (T::MIN) totals = of_both<ONE, BESIDE>(x.totals + pair * 2, x.d_at[n]);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float e[2] = {b ? scales.y : scales.x, b ? scales.w : scales.z};
            // exact: scales have 12 significant bits
            const float back[2] = {__fmul_rn(-MAGIC, e[0]), __fmul_rn(-MAGIC, e[1])};
            const u32 b0 = b ? v.z : v.x, b1 = b ? v.w : v.y;
            auto add = [&](int (&c)[4], const float (&scale)[2], float (&to)[4]) {
#pragma unroll
                for (int i = 0; i < 4; i += STEP)
                    to[i] = __fmaf_rn(scale[i >> 1], __fmaf_rn(__int_as_float(c[i]), e[i & 1], back[i & 1]), to[i]);
            };
#pragma unroll
            for (int r = 0; r < MT; r++) {
                int c[4];
                if (T::K16) {
                    mma_s8_16(c, tile[r].a[b][0], tile[r].a[b][1], b0, magic);
                    add(c, tile[r].d[b], acc[r][n]);
                    mma_s8_16(c, tile[r].a[b][2], tile[r].a[b][3], b1, magic);
                    add(c, tile[r].m[b], acc[r][n]);
                } else {
                    mma_s8(c, tile[r].a[b], b0, b1, magic);
                    add(c, tile[r].d[b], acc[r][n]);
                    if (T::MIN) {
                        const float sum[2] = {b ? totals.y : totals.x, b ? totals.w : totals.z};
#pragma unroll
                        for (int i = 0; i < 4; i += STEP) acc[r][n][i] = __fmaf_rn(tile[r].m[b][i >> 1], sum[i & 1], acc[r][n][i]);
                    }
                }
            }
        }
    }
}

// Minima of the blocks of 256 values that are in a segment (K32): small integers times the sums of the blocks' inputs, as a
// product of its own, in which a sum is two bf16. Lane t of four holds the minima of the t-th pair.
struct Minima {
    u32 of[2] = {0, 0}; // rows g and g + 8

    // Whether `pair` is the last of its four, or of its segment.
    static INLINE bool due(int pair, int last) { return (pair & 3) == 3 || pair == last - 1; }
    // `s`: scales and minima of pair `pair`.
    INLINE void keep(uint2 s, int pair) {
        if ((pair & 3) == (int)(threadIdx.x & 3)) {
            of[0] = s.x;
            of[1] = s.y;
        }
    }
    // For 8 NT columns. `sums`: those of column g, of the t-th pair.
    template <int NT, bool ONE> INLINE void subtract(const u32 (&super)[2], const uint2 (&sums)[NT], float (&acc)[NT][4]) {
        u32 a[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            a[r] = __float_as_uint((float)(of[r] >> 8 & 255)) >> 16 | __float_as_uint((float)(of[r] >> 24)) & 0xffff0000u;
            of[r] = 0;
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float c[4] = {0, 0, 0, 0};
            mma_bf16(c, make_uint4(a[0], a[1], a[0], a[1]), sums[n].x, sums[n].y);
#pragma unroll
            for (int i = 0; i < 4; i += ONE ? 2 : 1) acc[n][i] = __fmaf_rn(-high_half(super[i >> 1]), c[i], acc[n][i]);
        }
    }
};

// What becomes of the product.
#define E_RAW 0      // stored; a logit's soft cap
#define E_RESIDUAL 1 // added to the residual stream, which becomes the input of the next step
#define E_GATE 2     // gate and up (rows g and g + 8 of a tile), activated; the input of the next step
#define E_UP 3       // up alone, activated

#define A_SILU 0
#define A_GELU 1

struct GemmArgs {
    Matrix matrix[3];
    Acts in;
    const int *map;    // G::MAP: row of `in` for each column
    int columns;       // of this launch's; blockIdx.y counts tiles of 8 NT
    float *out;        // E_RAW: [column][stride], each matrix from its `first` on; E_RESIDUAL: the residual stream
    const float *gain; // E_RESIDUAL: of the next norm
    Acts next;
    float *partial;    // of segments that thread blocks of their own compute: [tile][segment][value][thread]
    u32 *arrived;      // [tile]
    u64 *trace;
};

DEV float activate(int act, float x) {
    if (act == A_SILU) return __fdiv_rn(x, __fadd_rn(1.0f, exp_(-x)));
    const float inner = __fmul_rn(0.7978845608028654f, __fmaf_rn(__fmul_rn(0.044715f, __fmul_rn(x, x)), x, x));
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, tanhf(inner)));
}

// G: what is known of a step when its kernel is generated:
//   PAIRS, SEGS, SEG (pairs a segment), MT, EPI, COUNT (matrices), F0..F2, ROWS0..2, STRIDE, NORM (divide by the root
//   mean square), MAP, BLOCKS (of the residual stream), EPS, ACT, CAP, FORMS (of `next`; 0: none), NEXT_PAIRS

// Sums of squares of a row of the residual stream, which a warp asks for, and 1 / root mean square.
template <class G> struct Squares {
    float of[(G::BLOCKS + 31) / 32 + 1];

    INLINE void load(const GemmArgs &p, int column) {
        if (!G::NORM) return;
        const int lane = threadIdx.x & 31;
        const float *from = p.in.squares + (long long)(G::MAP ? p.map[column] : column) * G::BLOCKS;
#pragma unroll
        for (int b = 0; b < G::BLOCKS; b += 32) of[b / 32] = b + lane < G::BLOCKS ? from[b + lane] : 0.0f;
    }
    INLINE float root() const {
        if (!G::NORM) return 1.0f;
        float v = 0;
#pragma unroll
        for (int b = 0; b < G::BLOCKS; b += 32) v = __fadd_rn(v, of[b / 32]);
        v = warp_sum(v);
        return __frsqrt_rn(__fadd_rn(__fdiv_rn(v, (float)(G::BLOCKS * 32)), G::EPS));
    }
};

// What the end of a step needs of one column beside the product, asked for before that is there.
template <class G> struct Ahead {
    float x, gain;

    INLINE void load(const GemmArgs &p, int column, int unit, bool there) {
        x = gain = 0;
        const int row = unit * 32 + (threadIdx.x & 31);
        if (G::EPI == E_RESIDUAL && there && row < G::ROWS0) {
            x = p.out[(long long)column * G::STRIDE + row];
            if (G::FORMS) gain = p.gain[row];
        }
    }
};

// The sum of `segs` segments that lie `stride` floats apart.
template <int SEGS> DEV float total(const float *sums, int stride) {
    float v = sums[0];
#pragma unroll
    for (int s = 1; s < SEGS; s++) v = __fadd_rn(v, sums[s * stride]);
    return v;
}

// What becomes of one column of a unit of MT tile rows. `sums` is the column's first: [tile row][columns][16], SEGS times
// `stride` apart; tile rows lie `tile` floats apart.
template <class G, int SEGS>
DEV void finish_column(const GemmArgs &p, int which, int start, int unit, int column, const float *sums, int tile, int stride,
                       const Ahead<G> &ahead, float root) {
    const int lane = threadIdx.x & 31;
    const float *bias = which == 0 ? p.matrix[0].bias : which == 1 ? p.matrix[1].bias : p.matrix[2].bias;
    // the gate and up rows of a step lie in one matrix
    const int rows = G::EPI == E_GATE ? G::ROWS0 / 2 : which == 0 ? G::ROWS0 : which == 1 ? G::ROWS1 : G::ROWS2;
    auto sum = [&](int mt, int row) { return __fmul_rn(total<SEGS>(sums + mt * tile + row, stride), root); };
    if (G::EPI == E_RAW) {
#pragma unroll
        for (int i = 0; i < G::MT * 16; i += 32) {
            const int r = i + lane, row = unit * G::MT * 16 + r;
            if (r < G::MT * 16 && row < rows) {
                float v = sum(r >> 4, r & 15);
                if (bias) v = __fadd_rn(v, bias[row]);
                if (G::CAP > 0) v = __fmul_rn(G::CAP, tanhf(__fdiv_rn(v, G::CAP)));
                p.out[(long long)column * G::STRIDE + start + row] = v;
            }
        }
    } else if (G::EPI == E_RESIDUAL) {
        const int row = unit * 32 + lane;
        float v = 0;
        if (row < rows) {
            v = sum(lane >> 4, lane & 15);
            if (bias) v = __fadd_rn(v, bias[row]);
            v = __fadd_rn(ahead.x, v);
            p.out[(long long)column * G::STRIDE + row] = v;
        }
        if (G::FORMS && unit * 32 < rows)
            store_residual<G::FORMS>(p.next, column, G::NEXT_PAIRS, G::STRIDE / 32, unit, v, ahead.gain);
    } else {
        const int row = unit * 32 + lane;
        float v = 0;
        if (row < rows) {
            if (G::EPI == E_GATE) {
                float gate = sum(lane >> 3, lane & 7), up = sum(lane >> 3, 8 + (lane & 7));
                if (bias) gate = __fadd_rn(gate, bias[row]);
                if (p.matrix[1].bias) up = __fadd_rn(up, p.matrix[1].bias[row]);
                v = __fmul_rn(activate(G::ACT, gate), up);
            } else {
                float up = sum(lane >> 4, lane & 15);
                if (bias) up = __fadd_rn(up, bias[row]);
                v = activate(G::ACT, up);
            }
        }
        if (unit * 32 < rows) store_block<G::FORMS>(p.next, column, G::NEXT_PAIRS, unit, v);
    }
}

// Which matrix of a step a thread block works on, and its number there; `each` tile rows a thread block.
template <class G> DEV int choose_matrix(int &unit, int &start, int each) {
    int which = 0;
    start = 0;
    const int units0 = (G::ROWS0 + 16 * each - 1) / (16 * each), units1 = (G::ROWS1 + 16 * each - 1) / (16 * each);
    if (G::COUNT > 1 && unit >= units0) { unit -= units0; which = 1; start = G::ROWS0; }
    if (G::COUNT > 2 && which == 1 && unit >= units1) { unit -= units1; which = 2; start = G::ROWS0 + G::ROWS1; }
    return which;
}
template <class G> struct Kind {
    static constexpr bool SAME = (G::COUNT < 2 || G::F1 == G::F0) && (G::COUNT < 3 || G::F2 == G::F0);
};
DEV Matrix matrix_of(const GemmArgs &p, int which) { return which == 0 ? p.matrix[0] : which == 1 ? p.matrix[1] : p.matrix[2]; }
