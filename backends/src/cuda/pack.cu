// From the file's blocks to tiles. The storage types are those of quant.rs; a thread takes 32 values of a row.

struct PackArgs {
    const u8 *raw;  // rows of the file's blocks
    int row0;       // of the tensor
    int rows;       // in `raw`
    int cols;
    int type;       // ggml's number
    int half;       // 0: rows in order; 1, 2: the upper, lower eight rows of each tile
    int tile0;      // first tile of this tensor in the matrix
    int pairs;
    uint4 *q;
    u32 *high;
    u32 *s;
    u32 *super;
};

DEV u32 word16(const u8 *b) { return b[0] | b[1] << 8; }

// Values 0 .. 31 of block `k / 32` of a row, as the integers that the tile holds, and what scales them. For halves: the
// values themselves.
struct Block {
    int q[32];
    float f[32];
    u32 d, m;      // halves
    int s[2], min; // small scales
};

DEV void scale_min(const u8 *s, int j, int &scale, int &min) {
    if (j < 4) { scale = s[j] & 63; min = s[j + 4] & 63; }
    else { scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4; min = (s[j + 4] >> 4) | (s[j] >> 6) << 4; }
}

__device__ const i8 IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

DEV int nibble(const u8 *q, int i) { return i < 16 ? q[i] & 15 : q[i - 16] >> 4; }

DEV void read_block(int type, const u8 *row, int block, Block &o) {
    o.d = o.m = 0; o.s[0] = o.s[1] = o.min = 0;
    const int j = block & 7; // of a block of 256
    for (int i = 0; i < 32; i++) {
        int q = 0;
        float f = 0;
        switch (type) {
        case 0: { const u8 *b = row + (block * 32 + i) * 4; f = __uint_as_float(word16(b) | word16(b + 2) << 16); break; }
        case 1: case 30: f = __uint_as_float(word16(row + (block * 32 + i) * 2)); break;
        case 2: { const u8 *b = row + block * 18; o.d = word16(b); q = nibble(b + 2, i); break; }
        case 3: { const u8 *b = row + block * 20; o.d = word16(b); o.m = word16(b + 2); q = nibble(b + 4, i); break; }
        case 6: { const u8 *b = row + block * 22; o.d = word16(b); q = nibble(b + 6, i) | (b[2 + i / 8] >> (i % 8) & 1) << 4; break; }
        case 7: { const u8 *b = row + block * 24; o.d = word16(b); o.m = word16(b + 2); q = nibble(b + 8, i) | (b[4 + i / 8] >> (i % 8) & 1) << 4; break; }
        case 8: { const u8 *b = row + block * 34; o.d = word16(b); q = (i8)b[2 + i]; break; }
        case 11: {
            const u8 *b = row + block / 8 * 110, *s = b + 96;
            const int at = j * 32 + i, k = at / 16;
            const int low = k < 8 ? s[k] & 15 : s[k - 8] >> 4;
            o.d = word16(b + 108);
            o.s[i / 16] = (low | (s[8 + k % 4] >> (k / 4 * 2) & 3) << 4) - 32;
            // a value less 32, as the six-bit tiles have it
            q = (b[32 + at / 128 * 32 + at % 32] >> (at % 128 / 32 * 2) & 3) + ((b[at % 32] >> (at / 32) & 1) << 2) - 4 + 32;
            break; }
        case 12: {
            const u8 *b = row + block / 8 * 144;
            o.d = word16(b); o.m = word16(b + 2);
            scale_min(b + 4, j, o.s[0], o.min);
            const u8 v = b[16 + j / 2 * 32 + i];
            q = j & 1 ? v >> 4 : v & 15;
            break; }
        case 13: {
            const u8 *b = row + block / 8 * 176;
            o.d = word16(b); o.m = word16(b + 2);
            scale_min(b + 4, j, o.s[0], o.min);
            const u8 v = b[48 + j / 2 * 32 + i];
            q = (j & 1 ? v >> 4 : v & 15) | (b[16 + i] >> j & 1) << 4;
            break; }
        case 14: {
            const u8 *b = row + block / 8 * 210;
            const int at = j * 32 + i, n = at / 128, l = at % 32, quarter = at % 128 / 32;
            const u8 low = b[n * 64 + (quarter & 1) * 32 + l];
            o.d = word16(b + 208);
            o.s[i / 16] = (i8)b[192 + at / 16];
            q = (quarter < 2 ? low & 15 : low >> 4) | (b[128 + n * 32 + l] >> (quarter * 2) & 3) << 4;
            break; }
        case 20: { const u8 *b = row + block * 18; o.d = word16(b); q = IQ4[nibble(b + 2, i)]; break; }
        case 23: {
            const u8 *b = row + block / 8 * 136;
            o.d = word16(b);
            o.s[0] = o.s[1] = ((b[4 + j / 2] >> (j & 1) * 4 & 15) | (word16(b + 2) >> (2 * j) & 3) << 4) - 32;
            q = IQ4[nibble(b + 8 + j * 16, i)];
            break; }
        }
        o.q[i] = q;
        o.f[i] = f;
    }
}

template <int F> DEV void pack(const PackArgs &p) {
    using T = Format<F>;
    const int blocks = p.cols / 32;
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int local = (int)(n / blocks), block = (int)(n % blocks);
    if (local >= p.rows) return;
    long long row_bytes = 0;
    switch (p.type) {
    case 0: row_bytes = p.cols * 4LL; break;
    case 1: case 30: row_bytes = p.cols * 2LL; break;
    case 2: case 20: row_bytes = p.cols / 32 * 18LL; break;
    case 3: row_bytes = p.cols / 32 * 20LL; break;
    case 6: row_bytes = p.cols / 32 * 22LL; break;
    case 7: row_bytes = p.cols / 32 * 24LL; break;
    case 8: row_bytes = p.cols / 32 * 34LL; break;
    case 11: row_bytes = p.cols / 256 * 110LL; break;
    case 12: row_bytes = p.cols / 256 * 144LL; break;
    case 13: row_bytes = p.cols / 256 * 176LL; break;
    case 14: row_bytes = p.cols / 256 * 210LL; break;
    case 23: row_bytes = p.cols / 256 * 136LL; break;
    }
    Block v;
    read_block(p.type, p.raw + local * row_bytes, block, v);
    const int row = p.row0 + local;
    const int tile = p.tile0 + (p.half ? row >> 3 : row >> 4), g = row & 7, half = p.half ? p.half - 1 : row >> 3 & 1;
    const int pair = block >> 1, b = block & 1;
    const long long at = (long long)tile * p.pairs + pair;
    if (T::HALF) {
        for (int part = 0; part < T::Q / 4; part++)
            for (int i = 0; i < 32; i++) {
                const int step = b * 2 + (i >> 4), t = (i & 15) >> 2, j = i & 3, lane = g * 4 + t;
                u16 bits;
                if (F == F_F32) {
                    bits = float_to_bf16(v.f[i]);
                    v.f[i] = __fsub_rn(v.f[i], bf16_to_float(bits));
                } else bits = (u16)__float_as_uint(v.f[i]);
                ((u16 *)(p.q + (at * T::Q + part * 4 + step) * 32 + lane))[(j >> 1) * 4 + half * 2 + (j & 1)] = bits;
            }
        return;
    }
    u32 *words = (u32 *)(p.q + at * T::Q * 32);
    for (int t = 0; t < 4; t++) {
        const int lane = g * 4 + t;
        u32 low = 0, high = 0, bits = 0;
        for (int j = 0; j < 4; j++) {
            const int lo = v.q[4 * t + j], hi = v.q[16 + 4 * t + j];
            if (T::Q == 2) {
                low |= (u32)(lo & 255) << (8 * j);
                high |= (u32)(hi & 255) << (8 * j);
            } else {
                low |= (u32)(lo & 15) << (8 * j) | (u32)(hi & 15) << (8 * j + 4);
                if (T::H == 1) bits |= (u32)(lo >> 4 & 1) << (8 * j + half) | (u32)(hi >> 4 & 1) << (8 * j + 2 + half);
                // the value's sign: it was 32 more
                if (T::H == 2) bits |= (u32)(lo >> 4 & 3 ^ 2) << (8 * j + 2 * half) | (u32)(hi >> 4 & 3 ^ 2) << (8 * j + 4 + 2 * half);
            }
        }
        if (T::Q == 2) {
            words[(b * 32 + lane) * 4 + half] = low;
            words[(b * 32 + lane) * 4 + 2 + half] = high;
        } else {
            words[lane * 4 + b * 2 + half] = low;
        }
        // the bits of the other rows and block are other threads'
        if (T::H == 1) atomicOr(p.high + at * 32 + lane, b ? bits << 4 : bits);
        if (T::H == 2) atomicOr(p.high + (at * 2 + b) * 32 + lane, bits);
    }
    if (T::DM) p.s[(at * 8 + g) * 4 + half * 2 + b] = v.d | v.m << 16;
    else if (T::K32) ((u16 *)p.s)[(at * 8 + g) * 4 + half * 2 + b] = (u16)(v.s[0] | v.min << 8);
    else if (T::K16) ((u16 *)p.s)[(at * 8 + g) * 4 + half * 2 + b] = (u16)((v.s[0] & 255) | (v.s[1] & 255) << 8);
    else ((u16 *)p.s)[(at * 8 + g) * 4 + half * 2 + b] = (u16)v.d;
    if (T::SUPER && (block & 7) == 0) {
        const long long sat = ((long long)tile * ((p.pairs + 3) / 4) + pair / 4) * 8 + g;
        if (T::SUPER == 2) p.super[sat * 2 + half] = v.d | v.m << 16;
        else ((u16 *)p.super)[sat * 2 + half] = (u16)v.d;
    }
}
