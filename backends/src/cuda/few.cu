// Products of few columns: bound by how fast weights come. A warp takes a segment of a tile row, straight into registers; a
// thread block holds MT tile rows times SEGS segments, whose sums meet in shared memory. The first weights are asked for
// before the kernel ahead is done.

// Pairs whose loads are under way together: a whole segment if it is short.
template <class T> constexpr INLINE int chunk(int nt, int seg) { return T::HALF || nt > 2 ? 1 : seg <= 4 / T::Q ? seg : 2 / T::Q; }

// One segment of one tile row. ONE: the launch has one column. `begins`: also asks for what the end of the step needs.
template <class G, int NT, bool ONE, int F>
DEV void accumulate(const GemmArgs &p, const Matrix &m, int unit, int seg, bool begins, float *sums, Ahead<G> &ahead, float &root) {
    using T = Format<F>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int mt = warp % G::MT;
    const int tile = unit * G::MT + mt, first = seg * G::SEG;
    const int last = min(first + G::SEG, G::PAIRS);
    constexpr int CHUNK = chunk<T>(NT, G::SEG);
    constexpr bool EXACT = G::PAIRS % G::SEG == 0 && G::SEG % CHUNK == 0;
    Tile<F> now[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) if (EXACT || first + i < last) now[i].load(m, tile, G::PAIRS, first + i);
    wait_previous(p.trace);
    const bool ends = begins && warp < min(NT * 8, p.columns);
    Squares<G> squares;
    if (ends) squares.load(p, warp);
    if (begins) ahead.load(p, warp, unit, ends);
    // columns beyond the last are it again, from the cache, and dropped
    constexpr int Q = G::PAIRS * (T::HALF ? 128 : 64), D = G::PAIRS * 2;
    auto row_of = [&](int c) { c = ONE ? 0 : min(c, p.columns - 1); return G::MAP ? p.map[c] : c; };
    Columns<NT> x;
    x.q = (T::HALF ? (const u8 *)p.in.h + t * 32 : p.in.q + t * 16);
    x.d = T::HALF ? p.in.hd : p.in.d;
    x.totals = p.in.totals;
    x.hi = 16;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        x.q_at[n] = row_of(n * 8 + g) * Q;
#pragma unroll
        for (int i = 0; i < 2; i++) x.d_at[n][i] = row_of(n * 8 + 2 * t + i) * D;
    }
    float acc[1][NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[0][n][i] = 0;
    Minima minima;
    auto add = [&](const Tile<F> &one, int pair) {
        if constexpr (T::HALF) {
            const Tile<F> tiles[1] = {one};
            multiply_halves<F, 1, NT, ONE, false>(tiles, x, pair, acc);
        } else {
            Ready<F> ready[1];
            ready[0].block(one, 0);
            ready[0].block(one, 1);
            multiply_bytes<F, 1, NT, ONE, false>(ready, x, pair, acc);
        }
        if (T::K32) {
            minima.keep(one.s[0], pair);
            if (Minima::due(pair, last)) {
                uint2 of[NT];
                const int own = (pair & ~3) + t;
#pragma unroll
                for (int n = 0; n < NT; n++) of[n] = p.in.sums[(x.q_at[n] >> 6) + own];
                minima.template subtract<NT, ONE>(one.super, of, acc[0]);
            }
        }
    };
    constexpr int CHUNKS = (G::SEG + CHUNK - 1) / CHUNK;
    if constexpr (CHUNKS > 1)
#pragma unroll 1
        for (int c = 0; c < CHUNKS - 1; c++) {
            const int at = first + c * CHUNK;
            Tile<F> next[CHUNK];
#pragma unroll
            for (int i = 0; i < CHUNK; i++) if (EXACT || at + CHUNK + i < last) next[i].load(m, tile, G::PAIRS, at + CHUNK + i);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) if (EXACT || at + i < last) add(now[i], at + i);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) now[i] = next[i];
        }
    const int at = first + (CHUNKS - 1) * CHUNK;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) if (EXACT || at + i < last) add(now[i], at + i);
    float *to = sums + (seg * G::MT + mt) * 16 * (ONE ? 1 : NT * 8);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = n * 8 + 2 * t + (i & 1);
            if (column < (ONE ? 1 : p.columns)) to[column * 16 + g + 8 * (i >> 1)] = acc[0][n][i];
        }
    if (ends) root = squares.root();
}

// ROUNDS: segments that a warp takes one after another, where more registers than fit are needed otherwise.
template <class G, int NT, bool ONE, int ROUNDS> DEV void few(const GemmArgs &p) {
    constexpr int COLUMNS = ONE ? 1 : NT * 8, EACH = (G::SEGS + ROUNDS - 1) / ROUNDS, WARPS = G::MT * EACH;
    float *sums = (float *)dynamic_shared;
    launch_next();
    int unit = blockIdx.x, start;
    const int which = choose_matrix<G>(unit, start, G::MT);
    Ahead<G> ahead;
    float root = 1;
    const int warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
        const int seg = round * EACH + warp / G::MT;
        if (ROUNDS > 1 && seg >= G::SEGS) break;
        if (Kind<G>::SAME || which == 0) accumulate<G, NT, ONE, G::F0>(p, matrix_of(p, which), unit, seg, round == 0, sums, ahead, root);
        else if (which == 1) accumulate<G, NT, ONE, G::F1>(p, p.matrix[1], unit, seg, round == 0, sums, ahead, root);
        else accumulate<G, NT, ONE, G::F2>(p, p.matrix[2], unit, seg, round == 0, sums, ahead, root);
    }
    const int columns = min(COLUMNS, p.columns);
    __syncthreads();
    for (int c = warp; c < columns; c += WARPS) {
        if (c != warp) {
            Squares<G> squares;
            squares.load(p, c);
            ahead.load(p, c, unit, true);
            root = squares.root();
        }
        finish_column<G, G::SEGS>(p, which, start, unit, c, sums + c * 16, 16 * COLUMNS, G::MT * 16 * COLUMNS, ahead, root);
    }
}
