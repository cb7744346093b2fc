// Products y = W x for 1 .. 8 NT columns x, with what the plan fuses behind them.
//
// W lies in tiles of 16 rows by one pair of blocks (64 columns), each as the A operand of the tensor core's integer (or
// half) product, so that a warp reads a tile in whole cache lines straight into registers. A warp computes one tile row
// over one segment of the columns; a thread block holds MT tile rows times SEGS segments, whose sums meet in shared
// memory in the order of the segments. Segments depend on the matrix alone: a column's bits don't depend on how many
// columns there are.
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
    // a minimum, or an offset that acts as one
    static constexpr bool MIN = DM || K32 || F == F_Q4_0 || F == F_Q5_0;
    // pairs whose loads are under way together: a whole segment if it is short
    static constexpr INLINE int chunk(int nt, int seg) {
        return HALF || nt > 2 ? 1 : seg <= 4 / Q ? seg : 2 / Q;
    }
};

template <int F> struct Tile {
    uint4 q[Format<F>::Q];
    u32 h[Format<F>::H + 1];
    uint2 s[Format<F>::S + 1];
    u32 super[2];

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
                // 6 bits less 32, byte by byte
                const u32 v = a[r] | (r < 2 ? h[b] << (4 - 2 * r) : h[b] >> (2 * r - 4)) & 0x30303030u;
                a[r] = ((v | 0x80808080u) - 0x20202020u) ^ 0x80808080u;
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

// The columns of one warp's product, as offsets from the first of its inputs.
template <int NT> struct Columns {
    const u8 *q;      // bytes or halves
    const float *d;   // scales
    int q_at[NT];     // of column g
    int d_at[NT][2];  // of columns 2 t and 2 t + 1
};

#define MAGIC 12582912.0f

template <int F, int NT>
DEV void multiply(const Tile<F> &tile, const Columns<NT> &x, int pair, float acc[NT][4]) {
    using T = Format<F>;
    if (T::HALF) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint4 *p = (const uint4 *)(x.q + x.q_at[n] + pair * 128);
            const uint4 lo = p[0], hi = p[1];
            if (F == F_F16) {
                const float2 d0 = *(const float2 *)(x.d + x.d_at[n][0] + pair * 2), d1 = *(const float2 *)(x.d + x.d_at[n][1] + pair * 2);
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    float c[4] = {0, 0, 0, 0};
                    const uint4 a0 = tile.q[2 * b], a1 = tile.q[2 * b + 1], v = b ? hi : lo;
                    mma_f16(c, a0.x, a0.y, a0.z, a0.w, v.x, v.y);
                    mma_f16(c, a1.x, a1.y, a1.z, a1.w, v.z, v.w);
                    const float e0 = b ? d0.y : d0.x, e1 = b ? d1.y : d1.x;
                    acc[n][0] = __fmaf_rn(c[0], e0, acc[n][0]);
                    acc[n][1] = __fmaf_rn(c[1], e1, acc[n][1]);
                    acc[n][2] = __fmaf_rn(c[2], e0, acc[n][2]);
                    acc[n][3] = __fmaf_rn(c[3], e1, acc[n][3]);
                }
            } else {
#pragma unroll
                for (int part = 0; part < T::Q / 4; part++) {
                    mma_bf16(acc[n], tile.q[part * 4], lo.x, lo.y);
                    mma_bf16(acc[n], tile.q[part * 4 + 1], lo.z, lo.w);
                    mma_bf16(acc[n], tile.q[part * 4 + 2], hi.x, hi.y);
                    mma_bf16(acc[n], tile.q[part * 4 + 3], hi.z, hi.w);
                }
            }
        }
        return;
    }
    u32 a[2][4];
    float d[2][2], m[2][2];
#pragma unroll
    for (int b = 0; b < 2; b++) {
        tile.operand(b, a[b]);
        tile.scales(b, d[b], m[b]);
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const uint4 v = *(const uint4 *)(x.q + x.q_at[n] + pair * 64);
        const float4 s0 = *(const float4 *)(x.d + x.d_at[n][0] + pair * 4), s1 = *(const float4 *)(x.d + x.d_at[n][1] + pair * 4);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float e[2] = {b ? s0.z : s0.x, b ? s1.z : s1.x}, sum[2] = {b ? s0.w : s0.y, b ? s1.w : s1.y};
            const u32 b0 = b ? v.z : v.x, b1 = b ? v.w : v.y;
            if (T::K16) {
                int lo[4] = {0, 0, 0, 0}, hi[4] = {0, 0, 0, 0};
                mma_s8_16(lo, a[b][0], a[b][1], b0);
                mma_s8_16(hi, a[b][2], a[b][3], b1);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int both = lo[i] * tile.small(b, i >> 1, 0) + hi[i] * tile.small(b, i >> 1, 1);
                    acc[n][i] = __fmaf_rn(d[b][i >> 1], __fmul_rn((float)both, e[i & 1]), acc[n][i]);
                }
            } else {
                const int magic = __float_as_int(MAGIC);
                int c[4] = {magic, magic, magic, magic};
                mma_s8(c, a[b], b0, b1);
                const float back[2] = {__fmul_rn(-MAGIC, e[0]), __fmul_rn(-MAGIC, e[1])};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // exact: scales have 12 significant bits
                    const float t = __fmaf_rn(__int_as_float(c[i]), e[i & 1], back[i & 1]);
                    acc[n][i] = __fmaf_rn(d[b][i >> 1], t, acc[n][i]);
                    if (T::MIN) acc[n][i] = __fmaf_rn(m[b][i >> 1], sum[i & 1], acc[n][i]);
                }
            }
        }
    }
}

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

// What the end of a step needs of one column beside the product, asked for before that is there.
template <class G> struct Ahead {
    float squares[(G::BLOCKS + 31) / 32 + 1], x, gain;

    INLINE void load(const GemmArgs &p, int column, int unit, bool there) {
        const int lane = threadIdx.x & 31;
        x = gain = 0;
        if (!there) return;
        if (G::NORM) {
            const float *from = p.in.squares + (long long)(G::MAP ? p.map[column] : column) * G::BLOCKS;
#pragma unroll
            for (int b = 0; b < G::BLOCKS; b += 32) squares[b / 32] = b + lane < G::BLOCKS ? from[b + lane] : 0.0f;
        }
        if (G::EPI == E_RESIDUAL) {
            const int row = unit * 32 + lane;
            if (row < G::ROWS0) {
                x = p.out[(long long)column * G::STRIDE + row];
                if (G::FORMS) gain = p.gain[row];
            }
        }
    }
    // 1 / root mean square of the residual stream.
    INLINE float root() const {
        if (!G::NORM) return 1.0f;
        float v = 0;
#pragma unroll
        for (int b = 0; b < G::BLOCKS; b += 32) v = __fadd_rn(v, squares[b / 32]);
        v = warp_sum(v);
        return __frsqrt_rn(__fadd_rn(__fdiv_rn(v, (float)(G::BLOCKS * 32)), G::EPS));
    }
};

template <class G, int NT, int F>
DEV void accumulate(const GemmArgs &p, const Matrix &m, int unit, float *sums, Ahead<G> &ahead) {
    using T = Format<F>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int mt = warp % G::MT, seg = warp / G::MT;
    const int tile = unit * G::MT + mt, first = seg * G::SEG;
    const int last = min(first + G::SEG, G::PAIRS);
    constexpr int CHUNK = T::chunk(NT, G::SEG);
    constexpr bool EXACT = G::PAIRS % G::SEG == 0 && G::SEG % CHUNK == 0;
    Tile<F> now[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) if (EXACT || first + i < last) now[i].load(m, tile, G::PAIRS, first + i);
    wait_previous(p.trace);
    const int column0 = blockIdx.y * NT * 8;
    ahead.load(p, column0 + warp, unit, warp < min(NT * 8, p.columns - column0));
    // Bytes and floats of a column. Columns beyond the last read what lies there, and are dropped; where one tile holds
    // all columns the last one is read instead, from the cache.
    constexpr int Q = G::PAIRS * (T::HALF ? 128 : 64), D = G::PAIRS * (T::HALF ? 2 : 4);
    Columns<NT> x;
    if (G::MAP || NT == 1) {
        auto row_of = [&](int c) { c = min(c, p.columns - 1); return G::MAP ? p.map[c] : c; };
        x.q = (T::HALF ? (const u8 *)p.in.h + t * 32 : p.in.q + t * 16);
        x.d = T::HALF ? p.in.hd : (const float *)p.in.d;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            x.q_at[n] = row_of(column0 + n * 8 + g) * Q;
#pragma unroll
            for (int i = 0; i < 2; i++) x.d_at[n][i] = row_of(column0 + n * 8 + 2 * t + i) * D;
        }
    } else {
        x.q = (T::HALF ? (const u8 *)p.in.h + t * 32 : p.in.q + t * 16) + (long long)(column0 + g) * Q;
        x.d = (T::HALF ? p.in.hd : (const float *)p.in.d) + (long long)(column0 + 2 * t) * D;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            x.q_at[n] = n * 8 * Q;
#pragma unroll
            for (int i = 0; i < 2; i++) x.d_at[n][i] = (n * 8 + i) * D;
        }
    }
    float acc[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0;
    constexpr int CHUNKS = (G::SEG + CHUNK - 1) / CHUNK;
    if constexpr (CHUNKS > 1)
#pragma unroll 1
    for (int c = 0; c < CHUNKS - 1; c++) {
        const int at = first + c * CHUNK;
        Tile<F> next[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; i++) if (EXACT || at + CHUNK + i < last) next[i].load(m, tile, G::PAIRS, at + CHUNK + i);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) if (EXACT || at + i < last) multiply<F, NT>(now[i], x, at + i, acc);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) now[i] = next[i];
    }
    const int at = first + (CHUNKS - 1) * CHUNK;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) if (EXACT || at + i < last) multiply<F, NT>(now[i], x, at + i, acc);
    float *to = sums + (seg * G::MT + mt) * 16 * (NT * 8);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = n * 8 + 2 * t + (i & 1);
            if (column0 + column < p.columns) to[column * 16 + g + 8 * (i >> 1)] = acc[n][i];
        }
}

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
                       const Ahead<G> &ahead) {
    const int lane = threadIdx.x & 31;
    const float *bias = which == 0 ? p.matrix[0].bias : which == 1 ? p.matrix[1].bias : p.matrix[2].bias;
    // the gate and up rows of a step lie in one matrix
    const int rows = G::EPI == E_GATE ? G::ROWS0 / 2 : which == 0 ? G::ROWS0 : which == 1 ? G::ROWS1 : G::ROWS2;
    const float root = ahead.root();
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

// Few columns: every warp a segment of a tile row.
template <class G, int NT> DEV void gemm(const GemmArgs &p) {
    float *sums = (float *)dynamic_shared;
    launch_next();
    int unit = blockIdx.x, start;
    const int which = choose_matrix<G>(unit, start, G::MT);
    Ahead<G> ahead;
    if (Kind<G>::SAME || which == 0) accumulate<G, NT, G::F0>(p, matrix_of(p, which), unit, sums, ahead);
    else if (which == 1) accumulate<G, NT, G::F1>(p, p.matrix[1], unit, sums, ahead);
    else accumulate<G, NT, G::F2>(p, p.matrix[2], unit, sums, ahead);
    const int warp = threadIdx.x >> 5, warps = G::MT * G::SEGS;
    const int column0 = blockIdx.y * NT * 8, columns = min(NT * 8, p.columns - column0);
    __syncthreads();
    for (int c = warp; c < columns; c += warps) {
        if (c != warp) ahead.load(p, column0 + c, unit, true);
        finish_column<G, G::SEGS>(p, which, start, unit, column0 + c, sums + c * 16, 16 * NT * 8, G::MT * 16 * NT * 8, ahead);
    }
}

// Many columns: every warp a tile row and 64 columns, whose inputs the thread block's eight warps share. Segments follow
// each other, and their sums are added in the same order as above.
#define WIDE 64
#define WARPS 8

template <int F> struct Stage {
    using T = Format<F>;
    // of one pair: bytes of a column, and of its scales
    static constexpr int Q = T::HALF ? 128 : 64, D = T::HALF ? (F == F_F16 ? 8 : 0) : 16;
    static constexpr int BYTES = WIDE * (Q + D), COUNT = 4;
};

template <class G, int F>
DEV void accumulate_wide(const GemmArgs &p, const Matrix &m, int tile, u8 *room, float total[8][4]) {
    using T = Format<F>;
    using S = Stage<F>;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, column0 = blockIdx.y * WIDE;
    auto fetch = [&](int pair) {
        u8 *to = room + (pair % S::COUNT) * S::BYTES;
        for (int i = threadIdx.x; i < WIDE * S::Q / 16; i += WARPS * 32) {
            const int c = i / (S::Q / 16), part = i % (S::Q / 16);
            int row = column0 + c;
            if (G::MAP) row = p.map[min(row, p.columns - 1)];
            copy_async(to + i * 16, (T::HALF ? (const u8 *)p.in.h : p.in.q) + ((long long)row * G::PAIRS + pair) * S::Q + part * 16);
        }
        if (S::D && threadIdx.x < WIDE) {
            int row = column0 + threadIdx.x;
            if (G::MAP) row = p.map[min(row, p.columns - 1)];
            const long long at = (long long)row * G::PAIRS + pair;
            if (T::HALF) copy_async8(to + WIDE * S::Q + threadIdx.x * 8, p.in.hd + at * 2);
            else copy_async(to + WIDE * S::Q + threadIdx.x * 16, p.in.d + at * 2);
        }
    };
    Tile<F> now;
    now.load(m, tile, G::PAIRS, 0);
    wait_previous(p.trace);
#pragma unroll
    for (int i = 0; i < S::COUNT - 1; i++) {
        if (i < G::PAIRS) fetch(i);
        copies_end();
    }
    float acc[8][4];
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) total[n][i] = acc[n][i] = 0;
    Columns<8> x;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        x.q_at[n] = n * 8 * S::Q;
#pragma unroll
        for (int i = 0; i < 2; i++) x.d_at[n][i] = (n * 8 + i) * (S::D / 4);
    }
#pragma unroll 1
    for (int pair = 0; pair < G::PAIRS; pair++) {
        copies_wait<S::COUNT - 2>();
        __syncthreads();
        if (pair + S::COUNT - 1 < G::PAIRS) fetch(pair + S::COUNT - 1);
        copies_end();
        const Tile<F> tile_ = now;
        if (pair + 1 < G::PAIRS) now.load(m, tile, G::PAIRS, pair + 1);
        const u8 *stage = room + (pair % S::COUNT) * S::BYTES;
        x.q = stage + g * S::Q + t * (T::HALF ? 32 : 16);
        x.d = (const float *)(stage + WIDE * S::Q) + 2 * t * (S::D / 4);
        multiply<F, 8>(tile_, x, 0, acc);
        if (pair % G::SEG == G::SEG - 1 || pair == G::PAIRS - 1) {
            const bool first = pair < G::SEG;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    total[n][i] = first ? acc[n][i] : __fadd_rn(total[n][i], acc[n][i]);
                    acc[n][i] = 0;
                }
        }
    }
}

template <class G> DEV void gemm_wide(const GemmArgs &p) {
    u8 *room = dynamic_shared;
    launch_next();
    int unit = blockIdx.x, start;
    const int which = choose_matrix<G>(unit, start, WARPS);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int tile = unit * WARPS + warp;
    float total[8][4];
    if (Kind<G>::SAME || which == 0) accumulate_wide<G, G::F0>(p, matrix_of(p, which), tile, room, total);
    else if (which == 1) accumulate_wide<G, G::F1>(p, p.matrix[1], tile, room, total);
    else accumulate_wide<G, G::F2>(p, p.matrix[2], tile, room, total);
    __syncthreads();
    float *sums = (float *)room;
    // sixteen rows a column, and four floats between columns of a tile so that banks differ
    constexpr int COLUMN = 20, TILE = WIDE * COLUMN;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[warp * TILE + (n * 8 + 2 * t + (i & 1)) * COLUMN + g + 8 * (i >> 1)] = total[n][i];
    __syncthreads();
    const int column0 = blockIdx.y * WIDE, columns = min(WIDE, p.columns - column0);
    Ahead<G> ahead;
    for (int c = warp; c < columns; c += WARPS) {
#pragma unroll 1
        for (int u = 0; u < WARPS / G::MT; u++) {
            const int own = unit * (WARPS / G::MT) + u;
            ahead.load(p, column0 + c, own, true);
            finish_column<G, 1>(p, which, start, own, column0 + c, sums + u * G::MT * TILE + c * COLUMN, TILE, 0, ahead);
        }
    }
}
