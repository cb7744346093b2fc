// Products of prompts: bound by arithmetic, so in bf16 by the tensor cores' fastest way. A thread block takes 128 rows, each of eight
// warps one tile row of them, and 8 NT columns. A warp widens its packed weights to bf16 in registers, as operand A; inputs come
// through stages of shared memory that all share, as operand B, and lie in memory as they lie there. One sum a value, from
// the first column of the matrix to the last: a row's bits depend neither on the other rows nor on NT.
#define PROMPT_TILES 8

// Operand A of the four products of a pair, 16 deep each: the weights, rounded once. `zero` is 0, which the compiler doesn't
// know: operands of products under way may not be what a load writes to, so halves are computed, too.
template <int F> DEV void widen(const Tile<F> &tile, u32 (&a)[4][4], u32 zero) {
    using T = Format<F>;
    if constexpr (T::HALF) {
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 v = tile.q[s];
            a[s][0] = v.x | zero; a[s][1] = v.y | zero; a[s][2] = v.z | zero; a[s][3] = v.w | zero;
        }
    } else {
        constexpr bool SIGNED = F == F_Q8_0 || F == F_Q6_K || F == F_Q8_K16;
        // a byte in the middle of these bits is the float 2^15 plus the byte
        constexpr u32 BASE = 0x47000000;
        constexpr float ZERO = SIGNED ? -32896.0f : -32768.0f;
#pragma unroll
        for (int b = 0; b < 2; b++) {
            u32 bytes[4];
            float d[2], m[2];
            tile.operand(b, bytes);
            tile.scales(b, d, m);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float small = T::K16 ? (float)tile.small(b, r, j) : 1.0f;
                    const float scale = T::K16 ? __fmul_rn(__fmul_rn(d[r], F == F_Q6_K ? 0.25f : 1.0f), small) : d[r];
                    const float least = T::K32 || T::MIN || T::DM ? __fmaf_rn(ZERO, scale, m[r]) : __fmul_rn(ZERO, scale);
                    const u32 w = SIGNED ? bytes[2 * j + r] ^ 0x80808080u : bytes[2 * j + r];
                    const float v0 = __fmaf_rn(__uint_as_float(__byte_perm(w, BASE, 0x7404)), scale, least);
                    const float v1 = __fmaf_rn(__uint_as_float(__byte_perm(w, BASE, 0x7414)), scale, least);
                    const float v2 = __fmaf_rn(__uint_as_float(__byte_perm(w, BASE, 0x7424)), scale, least);
                    const float v3 = __fmaf_rn(__uint_as_float(__byte_perm(w, BASE, 0x7434)), scale, least);
                    a[2 * b + j][r] = floats_to_bf16(v0, v1);
                    a[2 * b + j][2 + r] = floats_to_bf16(v2, v3);
                }
        }
    }
}

// Stages of a pair's inputs: columns of 128 bytes, whose eighths are exchanged (`prompt_place`). They, and later the sums, lie
// in shared memory from a multiple of 1,024 bytes on, as the tensor cores want it.
template <int NT> struct Inputs {
    static constexpr int BYTES = NT * 1024, COUNT = NT > 8 ? 6 : 8;
    // sixteen rows a column, and four floats between columns so that banks differ
    static constexpr int COLUMN = 20, SUMS = PROMPT_TILES * NT * 8 * COLUMN * 4;
    static constexpr int ROOM = COUNT * BYTES > SUMS ? COUNT * BYTES : SUMS;
};
// Behind them: when a stage's inputs are there, and when all warps are done with them.
struct Barriers {
    u64 full[8], empty[8];
};

// One warp: fetches inputs, as far ahead as there are stages.
template <class G, int NT> DEV void fetch_inputs(const GemmArgs &p, u8 *room, Barriers &barriers) {
    using I = Inputs<NT>;
    const int column0 = blockIdx.x * NT * 8;
    const u8 *in = (const u8 *)p.in.prompt + (long long)(column0 >> 7) * G::PAIRS * 16384 + (column0 & 127) * 128;
    wait_previous(p.trace);
#pragma unroll 1
    for (int pair = 0; pair < G::PAIRS; pair++) {
        const int stage = pair % I::COUNT, round = pair / I::COUNT;
        if (round > 0) barrier_wait(barriers.empty + stage, (round - 1) & 1);
        fetch_stage(barriers.full + stage, room + stage * I::BYTES, in + (long long)pair * 16384, I::BYTES);
    }
}

// Two others: the factors of the columns, sixteen at a time.
template <class G, int NT> DEV void find_roots(const GemmArgs &p, float *roots) {
    wait_previous(p.trace);
    if (!G::NORM) return;
#pragma unroll 1
    for (int c = ((threadIdx.x >> 5) - PROMPT_TILES - 1) * 16; c < NT * 8; c += 32) {
        Squares<G> squares[16];
#pragma unroll
        for (int i = 0; i < 16; i++) squares[i].load(p, min((int)blockIdx.x * NT * 8 + c + i, p.columns - 1));
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float root = squares[i].root();
            if ((threadIdx.x & 31) == 0) roots[c + i] = root;
        }
    }
}

template <class G, int F, int NT>
DEV void accumulate_prompt(const GemmArgs &p, const Matrix &m, int unit, u8 *room, Barriers &barriers, float (&acc)[NT][4]) {
    using I = Inputs<NT>;
    // pairs whose weights are under way, each in registers of its own: moving them would wait for them
    constexpr int AHEAD = Format<F>::Q == 4 ? 2 : 4;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tile = unit * PROMPT_TILES + warp;
    Tile<F> packed[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) if (i < G::PAIRS) packed[i].load(m, tile, G::PAIRS, i);
    wait_previous(p.trace);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0;
    // two operands: one is multiplied while the other one is widened
    const u32 zero = (u32)p.columns >> 31;
    u32 a[2][4][4];
    auto prepare = [&](int pair, Tile<F> &tile_, u32 (&to)[4][4]) {
        widen<F>(tile_, to, zero);
        if (pair + AHEAD < G::PAIRS) tile_.load(m, tile, G::PAIRS, pair + AHEAD);
    };
    prepare(0, packed[0], a[0]);
    int stage = 0, before = 0;
    u32 parity = 0;
    auto step = [&](int pair, int i) {
        barrier_wait(barriers.full + stage, parity);
        multiply_pair<NT>(acc, a[i & 1], room + stage * I::BYTES);
        multiplied<1>();
        if (pair > 0 && lane == 0) barrier_arrive(barriers.empty + before);
        before = stage;
        if (++stage == I::COUNT) {
            stage = 0;
            parity ^= 1;
        }
        if (pair + 1 < G::PAIRS) prepare(pair + 1, packed[(i + 1) % AHEAD], a[(i + 1) & 1]);
    };
#pragma unroll 1
    for (int pair = 0; pair + AHEAD <= G::PAIRS; pair += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++) step(pair + i, i);
#pragma unroll
    for (int i = 0; i < G::PAIRS % AHEAD; i++) step(G::PAIRS / AHEAD * AHEAD + i, i);
    multiplied<0>();
}

// The product as it is, from registers.
template <class G, int NT>
DEV void store_raw(const GemmArgs &p, int which, int start, int unit, int column0, int columns, const float *roots, const float (&acc)[NT][4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int rows = which == 0 ? G::ROWS0 : which == 1 ? G::ROWS1 : G::ROWS2;
    const float *bias = which == 0 ? p.matrix[0].bias : which == 1 ? p.matrix[1].bias : p.matrix[2].bias;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = (unit * PROMPT_TILES + warp) * 16 + half * 8 + g;
        if (row >= rows) continue;
        const float more = bias ? bias[row] : 0.0f;
        float *out = p.out + (long long)column0 * G::STRIDE + start + row;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int c = n * 8 + 2 * t + i;
                if (c < columns) out[(long long)c * G::STRIDE] = __fmaf_rn(acc[n][half * 2 + i], G::NORM ? roots[c] : 1.0f, more);
            }
    }
}

// What becomes of sums in shared memory; WHOLE: there are as many columns as can be, so that several of a warp's are under way.
template <class G, int NT, bool WHOLE>
DEV void finish_prompt(const GemmArgs &p, int which, int start, int unit, int column0, int columns, const float *sums, const float *roots) {
    constexpr int COLUMN = Inputs<NT>::COLUMN, TILE = NT * 8 * COLUMN, EACH = NT < 8 ? NT : 8;
    const int warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int u = 0; u < PROMPT_TILES / G::MT; u++) {
        const int own = unit * (PROMPT_TILES / G::MT) + u;
#pragma unroll 1
        for (int c0 = warp; c0 < (WHOLE ? NT * 8 : columns); c0 += 8 * EACH) {
            Ahead<G> ahead[EACH];
#pragma unroll
            for (int k = 0; k < EACH; k++) ahead[k].load(p, column0 + c0 + k * 8, own, WHOLE || c0 + k * 8 < columns);
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const int c = c0 + k * 8;
                if (!WHOLE && c >= columns) break;
                finish_column<G, 1>(p, which, start, own, column0 + c, sums + u * G::MT * TILE + c * COLUMN, TILE, 0, ahead[k], G::NORM ? roots[c] : 1.0f);
            }
        }
    }
}

template <class G, int NT> DEV void prompt(const GemmArgs &p) {
    __shared__ float roots[NT * 8];
    launch_next();
    int unit = blockIdx.y, start;
    const int which = choose_matrix<G>(unit, start, PROMPT_TILES);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int column0 = blockIdx.x * NT * 8, columns = min(NT * 8, p.columns - column0);
    u8 *room = dynamic_shared + (-shared_address(dynamic_shared) & 1023);
    Barriers &barriers = *(Barriers *)(room + Inputs<NT>::ROOM);
    if (threadIdx.x < Inputs<NT>::COUNT) {
        barrier_begin(barriers.full + threadIdx.x, FETCHERS);
        barrier_begin(barriers.empty + threadIdx.x, PROMPT_TILES);
        barriers_begun();
    }
    __syncthreads();
    float acc[NT][4];
    if (warp == PROMPT_TILES) fetch_inputs<G, NT>(p, room, barriers);
    else if (warp > PROMPT_TILES) find_roots<G, NT>(p, roots);
    else if (Kind<G>::SAME || which == 0) accumulate_prompt<G, G::F0, NT>(p, matrix_of(p, which), unit, room, barriers, acc);
    else if (which == 1) accumulate_prompt<G, G::F1, NT>(p, p.matrix[1], unit, room, barriers, acc);
    else accumulate_prompt<G, G::F2, NT>(p, p.matrix[2], unit, room, barriers, acc);
    __syncthreads();
    if (G::EPI == E_RAW) {
        if (warp < PROMPT_TILES) store_raw<G, NT>(p, which, start, unit, column0, columns, roots, acc);
        return;
    }
    constexpr int COLUMN = Inputs<NT>::COLUMN, TILE = NT * 8 * COLUMN;
    float *sums = (float *)room;
    if (warp < PROMPT_TILES)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[warp * TILE + (n * 8 + 2 * t + (i & 1)) * COLUMN + g + 8 * (i >> 1)] = acc[n][i];
    __syncthreads();
    if (warp >= PROMPT_TILES) return;
    if (columns == NT * 8) finish_prompt<G, NT, true>(p, which, start, unit, column0, columns, sums, roots);
    else finish_prompt<G, NT, false>(p, which, start, unit, column0, columns, sums, roots);
}
