// Attention of one row over one key/value head's cache, whole.
// Generated before it: HD, G (query heads a key/value head), GH (of them at a time), KH, NQKV (width of a row of raw),
// Q_NORM, K_NORM, PAIRS, ADJACENT, ROPE_LOW, ROPE_HIGH, TABLES, WINDOW, CAP, SCALE, KEY (vec4 a key), VALUE (words a
// value), GROUPS (of positions), FOLDED (of them whose lanes shuffle), DIMS (of a value that an invocation sums), OUT (columns of
// the result, padded).
// A span is 128 positions at absolute places; spans are folded in order, so the bits depend only on the position.
@group(0) @binding(0) var<storage, read> raw: array<f32>;
@group(0) @binding(1) var<storage, read> w1: array<u32>;
@group(0) @binding(2) var<storage, read> ropes: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> steps: array<u32>;
@group(0) @binding(4) var<storage, read_write> keys: array<vec4<u32>>;
//#if KV8
@group(0) @binding(5) var<storage, read_write> values: array<u32>;
//#else
@group(0) @binding(5) var<storage, read_write> values: array<vec4<u32>>;
//#end
//#if PART
@group(0) @binding(6) var<storage, read_write> partials: array<f32>;
//#else
@group(0) @binding(6) var<storage, read_write> outq: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read_write> outs: array<vec2<u32>>;
//#end

const SPAN = 128u;
const TPH = SPAN / GH;
// The queries at hand, and the row's own key behind them.
var<workgroup> qs: array<f32, (GH + 1u) * HD>;
var<workgroup> queries: array<vec4<f32>, GH * HD / 4u>;
var<workgroup> places: array<u32, SPAN>;
var<workgroup> weights: array<f32, GH * SPAN>;
var<workgroup> parts: array<f32, GROUPS / FOLDED * GH * HD>;
var<workgroup> state: array<f32, GH * HD>;
var<workgroup> red: array<f32, SPAN>;
var<workgroup> span_max: array<f32, GH>;
var<workgroup> run_max: array<f32, GH>;
var<workgroup> run_sum: array<f32, GH>;
var<workgroup> keep: array<f32, GH>;
var<workgroup> take: array<f32, GH>;

fn weight(at: u32, i: u32) -> f32 {
    return bitcast<f32>(w1[at + i]);
}

// The sum of every `step`th of a head's values in `red`.
fn head_sum(h: u32, step: u32) -> f32 {
    var total = 0.0;
    for (var i = 0u; i < TPH; i += step) {
        total += red[h * TPH + i];
    }
    return total;
}

// e^(most - now), exactly 1 where they are equal.
fn share(most: f32, now: f32) -> f32 {
    return select(decay(most - now), 1.0, most == now);
}

// Rotates `n` heads in qs from head `from` on.
fn rotate(from_head: u32, n: u32, position: u32, lid: u32) {
    for (var at = lid; at < n * PAIRS; at += SPAN) {
        let h = from_head + at / PAIRS;
        let i = at % PAIRS;
        let first = h * HD + select(i, 2u * i, ADJACENT);
        let second = h * HD + select(i + PAIRS, 2u * i + 1u, ADJACENT);
        let low = ropes[ROPE_LOW + (position % 256u) * PAIRS + i];
        let high = ropes[ROPE_HIGH + (position / 256u) * PAIRS + i];
        let cosine = fma(low.x, high.x, -(low.y * high.y));
        let sine = fma(low.y, high.x, low.x * high.y);
        let a = qs[first];
        let b = qs[second];
        qs[first] = fma(a, cosine, -(b * sine));
        qs[second] = fma(a, sine, b * cosine);
    }
}

//#norms

fn clamped(v: vec2<f32>) -> u32 {
    return pack2x16float(clamp(v, vec2<f32>(-65504.0), vec2<f32>(65504.0)));
}

// Where a position's key and value are.
fn place_of(position: u32, table: u32, kh: u32) -> u32 {
    return (steps[TABLES + table + position / 32u] * KH + kh) * 32u + position % 32u;
}

// Loads this row's key, behind the queries.
fn load_key(row: u32, kh: u32, lid: u32) {
    for (var d = lid; d < HD; d += SPAN) {
        qs[GH * HD + d] = raw[row * NQKV + (G * KH + kh) * HD + d];
    }
}

// Writes this row's key, which is loaded, normalised and rotated, and its value.
fn write_row(row: u32, kh: u32, position: u32, table: u32, lid: u32) {
    let place = place_of(position, table, kh);
    let value = row * NQKV + (G * KH + kh) * HD + KH * HD;
    let key = GH * HD;
    //#if KV8
    if lid < HD / 32u {
        // A block of 32: a step, and 32 signed bytes.
        var most = 0.0;
        var most_value = 0.0;
        for (var d = 32u * lid; d < 32u * lid + 32u; d++) {
            most = max(most, abs(qs[key + d]));
            most_value = max(most_value, abs(raw[value + d]));
        }
        let step = unpack2x16float(clamped(vec2<f32>(most, most_value) * (1.0 / 127.0)));
        let inverse = select(vec2<f32>(0.0), 1.0 / step, step > vec2<f32>(0.0));
        for (var v = 0u; v < 2u; v++) {
            var words = vec4<u32>();
            for (var k = 0u; k < 4u; k++) {
                let d = 32u * lid + 16u * v + 4u * k;
                let i = key + d;
                words[k] = bytes8(vec4<f32>(qs[i], qs[i + 1u], qs[i + 2u], qs[i + 3u]) * inverse.x);
                let r = value + d;
                values[place * VALUE + d / 4u] =
                    bytes8(vec4<f32>(raw[r], raw[r + 1u], raw[r + 2u], raw[r + 3u]) * inverse.y);
            }
            keys[place * KEY + 2u * lid + v] = words;
        }
        values[place * VALUE + HD / 4u + lid] = bitcast<u32>(step.y);
        red[lid] = step.x;
    }
    workgroupBarrier();
    if lid < (HD + 127u) / 128u {
        var steps4 = vec4<f32>();
        for (var k = 0u; k < min(4u, HD / 32u - 4u * lid); k++) {
            steps4[k] = red[4u * lid + k];
        }
        keys[place * KEY + HD / 16u + lid] = bitcast<vec4<u32>>(steps4);
    }
    //#else
    for (var w = lid; w < HD / 8u; w += SPAN) {
        let d = key + 8u * w;
        keys[place * KEY + w] = vec4<u32>(
            clamped(vec2<f32>(qs[d], qs[d + 1u])),
            clamped(vec2<f32>(qs[d + 2u], qs[d + 3u])),
            clamped(vec2<f32>(qs[d + 4u], qs[d + 5u])),
            clamped(vec2<f32>(qs[d + 6u], qs[d + 7u])),
        );
    }
    for (var w = lid; w < HD / 8u; w += SPAN) {
        let d = value + 8u * w;
        values[place * (HD / 8u) + w] = vec4<u32>(
            clamped(vec2<f32>(raw[d], raw[d + 1u])),
            clamped(vec2<f32>(raw[d + 2u], raw[d + 3u])),
            clamped(vec2<f32>(raw[d + 4u], raw[d + 5u])),
            clamped(vec2<f32>(raw[d + 6u], raw[d + 7u])),
        );
    }
    //#end
}

fn bytes8(v: vec4<f32>) -> u32 {
    return pack4xI8(clamp(vec4<i32>(round(v)), vec4<i32>(-127), vec4<i32>(127)));
}

fn q4(h: u32, d: u32) -> vec4<f32> {
    return queries[(h * HD + d) / 4u];
}

fn dot4(a: vec4<f32>, b: vec4<f32>, s: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, s))));
}

// Scores of the chunk's heads at one position.
fn scores(place: u32) -> array<f32, GH> {
    var s: array<f32, GH>;
    let at = place * KEY;
    //#if KV8
    for (var b = 0u; b < HD / 32u; b++) {
        let step = bitcast<f32>(keys[at + HD / 16u + b / 4u][b % 4u]);
        var part: array<f32, GH>;
        for (var v = 0u; v < 2u; v++) {
            let k = keys[at + 2u * b + v];
            let d = 32u * b + 16u * v;
            let k0 = vec4<f32>(unpack4xI8(k.x));
            let k1 = vec4<f32>(unpack4xI8(k.y));
            let k2 = vec4<f32>(unpack4xI8(k.z));
            let k3 = vec4<f32>(unpack4xI8(k.w));
            for (var h = 0u; h < GH; h++) {
                part[h] = dot4(q4(h, d), k0, part[h]);
                part[h] = dot4(q4(h, d + 4u), k1, part[h]);
                part[h] = dot4(q4(h, d + 8u), k2, part[h]);
                part[h] = dot4(q4(h, d + 12u), k3, part[h]);
            }
        }
        for (var h = 0u; h < GH; h++) {
            s[h] = fma(part[h], step, s[h]);
        }
    }
    //#else
    for (var w = 0u; w < HD / 8u; w++) {
        let k = keys[at + w];
        let k0 = vec4<f32>(unpack2x16float(k.x), unpack2x16float(k.y));
        let k1 = vec4<f32>(unpack2x16float(k.z), unpack2x16float(k.w));
        for (var h = 0u; h < GH; h++) {
            s[h] = dot4(q4(h, 8u * w), k0, s[h]);
            s[h] = dot4(q4(h, 8u * w + 4u), k1, s[h]);
        }
    }
    //#end
    return s;
}

// Values of this span, weighted, for the dimensions and positions that belong to this invocation: every GROUPS-th
// position.
fn sum_values(count: u32, lid: u32) {
    let lane = lid % (HD / DIMS);
    let group = lid / (HD / DIMS);
    if group >= GROUPS {
        return;
    }
    //#if KV8
    var sum: array<vec4<f32>, GH>;
    for (var p = group; p < count; p += GROUPS) {
        let place = places[p];
        let step = bitcast<f32>(values[place * VALUE + HD / 4u + lane / 8u]);
        let v = vec4<f32>(unpack4xI8(values[place * VALUE + lane])) * step;
        for (var h = 0u; h < GH; h++) {
            sum[h] = fma(vec4<f32>(weights[h * SPAN + p]), v, sum[h]);
        }
    }
    for (var h = 0u; h < GH; h++) {
        for (var d = 0u; d < DIMS; d++) {
            parts[(group * GH + h) * HD + DIMS * lane + d] = sum[h][d];
        }
    }
    //#else
    var low: array<vec4<f32>, GH>;
    var high: array<vec4<f32>, GH>;
    // Several values are asked for before the first is used. Those beyond the end have no weight.
    let last = count - 1u;
    for (var p = group; p < count; p += 4u * GROUPS) {
        var v: array<vec4<u32>, 4>;
        v[0] = values[places[p] * (HD / 8u) + lane];
        v[1] = values[places[min(p + GROUPS, last)] * (HD / 8u) + lane];
        v[2] = values[places[min(p + 2u * GROUPS, last)] * (HD / 8u) + lane];
        v[3] = values[places[min(p + 3u * GROUPS, last)] * (HD / 8u) + lane];
        for (var k = 0u; k < 4u; k++) {
            let a = vec4<f32>(unpack2x16float(v[k].x), unpack2x16float(v[k].y));
            let b = vec4<f32>(unpack2x16float(v[k].z), unpack2x16float(v[k].w));
            let at = p + k * GROUPS;
            for (var h = 0u; h < GH; h++) {
                let weight = vec4<f32>(select(0.0, weights[h * SPAN + min(at, SPAN - 1u)], at < count));
                low[h] = fma(weight, a, low[h]);
                high[h] = fma(weight, b, high[h]);
            }
        }
    }
    for (var h = 0u; h < GH; h++) {
        var a = low[h];
        var b = high[h];
        //#fold
        if group % FOLDED == 0u {
            let at = (group / FOLDED * GH + h) * HD + 8u * lane;
            for (var d = 0u; d < 4u; d++) {
                parts[at + d] = a[d];
                parts[at + 4u + d] = b[d];
            }
        }
    }
    //#end
}

// Folds one span into the state of `n` heads.
fn fold_span(n: u32, kh: u32, first: u32, row: vec2<u32>, lid: u32) {
    let position = first + lid;
    let visible = position <= row.x && (WINDOW == 0u || position + WINDOW > row.x);
    if position <= row.x {
        places[lid] = place_of(position, row.y, kh);
    }
    if visible {
        let s = scores(places[lid]);
        for (var h = 0u; h < GH; h++) {
            var score = s[h] * SCALE;
            //#if CAPPED
            score = capped(score, CAP);
            //#end
            weights[h * SPAN + lid] = max(score, 0.5 * NOTHING);
        }
    } else {
        for (var h = 0u; h < GH; h++) {
            weights[h * SPAN + lid] = NOTHING;
        }
    }
    workgroupBarrier();
    let h = lid / TPH;
    let l = lid % TPH;
    var most = NOTHING;
    for (var p = l; p < SPAN; p += TPH) {
        most = max(most, weights[h * SPAN + p]);
    }
    //#most
    red[lid] = most;
    workgroupBarrier();
    if l == 0u {
        for (var i = 0u; i < TPH; i += TOGETHER) {
            most = max(most, red[lid + i]);
        }
        span_max[h] = most;
    }
    workgroupBarrier();
    var sum = 0.0;
    for (var p = l; p < SPAN; p += TPH) {
        let score = weights[h * SPAN + p];
        let e = select(0.0, decay(score - span_max[h]), score > NOTHING);
        weights[h * SPAN + p] = e;
        sum += e;
    }
    //#sum
    red[lid] = sum;
    workgroupBarrier();
    if l == 0u {
        let total = head_sum(h, TOGETHER);
        let now = max(run_max[h], span_max[h]);
        keep[h] = share(run_max[h], now);
        take[h] = share(span_max[h], now);
        run_max[h] = now;
        run_sum[h] = fma(run_sum[h], keep[h], total * take[h]);
    }
    sum_values(min(SPAN, row.x + 1u - first), lid);
    workgroupBarrier();
    for (var at = lid; at < n * HD; at += SPAN) {
        var sum = 0.0;
        for (var g = 0u; g < GROUPS / FOLDED; g++) {
            sum += parts[g * GH * HD + at];
        }
        let h = at / HD;
        state[at] = fma(sum, take[h], state[at] * keep[h]);
    }
    workgroupBarrier();
}

// The row's position and where its block table begins.
fn row_of(row: u32) -> vec2<u32> {
    return vec2<u32>(steps[4u * row], steps[4u * row + 1u]);
}

// The first span that a position sees.
fn first_span(position: u32) -> u32 {
    return select(0u, (position + 1u - min(WINDOW, position + 1u)) / SPAN, WINDOW != 0u);
}

// Normalises the row's own key, where the model does.
fn norm_own_key(lid: u32) {
    //#if K_NORM
    norm_key(1u, lid);
    //#end
}

// `n` queries from `head` on, normalised and rotated, and a fresh state; the row's own key goes to the cache with them
// where that is wanted.
fn load_queries(n: u32, head: u32, kh: u32, row: u32, at_row: vec2<u32>, writes: bool, lid: u32) {
    workgroupBarrier();
    for (var at = lid; at < GH * HD; at += SPAN) {
        qs[at] = select(0.0, raw[row * NQKV + min(head * HD + at, NQKV - 1u)], at < n * HD);
        state[at] = 0.0;
    }
    if writes {
        load_key(row, kh, lid);
    }
    if lid < GH {
        run_max[lid] = NOTHING;
        run_sum[lid] = 0.0;
    }
    workgroupBarrier();
    //#if Q_NORM
    norm_query(n, lid);
    //#end
    if writes {
        norm_own_key(lid);
    }
    rotate(0u, n, at_row.x, lid);
    if writes {
        rotate(GH, 1u, at_row.x, lid);
    }
    workgroupBarrier();
    for (var i = lid; i < GH * HD / 4u; i += SPAN) {
        queries[i] = vec4<f32>(qs[4u * i], qs[4u * i + 1u], qs[4u * i + 2u], qs[4u * i + 3u]);
    }
    if writes {
        write_row(row, kh, at_row.x, at_row.y, lid);
        storageBarrier();
    }
    workgroupBarrier();
}

//#if WHOLE
@compute @workgroup_size(128)
fn attend(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let kh = wg.x;
    let row = row_of(wg.y);
    for (var chunk = 0u; chunk < G; chunk += GH) {
        let n = min(GH, G - chunk);
        let head = kh * G + chunk;
        load_queries(n, head, kh, wg.y, row, P.write != 0u && chunk == 0u, lid);
        for (var span = first_span(row.x); span <= row.x / SPAN; span++) {
            fold_span(n, kh, span * SPAN, row, lid);
        }
        for (var at = lid; at < n * HD; at += SPAN) {
            state[at] = state[at] / run_sum[at / HD];
        }
        workgroupBarrier();
        for (var b = lid; b < n * HD / 32u; b += SPAN) {
            let column = head * HD + 32u * b;
            var v: array<vec4<f32>, 8>;
            for (var k = 0u; k < 8u; k++) {
                let i = 32u * b + 4u * k;
                v[k] = vec4<f32>(state[i], state[i + 1u], state[i + 2u], state[i + 3u]);
            }
            //#put v wg.y column OUT
        }
    }
}
//#end

// One span of a row: its heads' sums, largest scores and weights, for `merge`.
//#if PART
@compute @workgroup_size(128)
fn attend_span(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let kh = wg.x;
    let row = row_of(wg.y);
    let span = first_span(row.x) + wg.z;
    if span > row.x / SPAN {
        return;
    }
    for (var chunk = 0u; chunk < G; chunk += GH) {
        let n = min(GH, G - chunk);
        let head = kh * G + chunk;
        let writes = P.write != 0u && chunk == 0u && span == row.x / SPAN;
        load_queries(n, head, kh, wg.y, row, writes, lid);
        fold_span(n, kh, span * SPAN, row, lid);
        let at = ((wg.y * P.spans + wg.z) * (G * KH) + head) * (HD + 2u);
        for (var i = lid; i < n * HD; i += SPAN) {
            partials[at + i / HD * (HD + 2u) + i % HD] = state[i];
        }
        if lid < n {
            partials[at + lid * (HD + 2u) + HD] = run_max[lid];
            partials[at + lid * (HD + 2u) + HD + 1u] = run_sum[lid];
        }
    }
}
//#end

// Keys and values of rows whose own batch looks at them from other rows.
//#if CACHE
@compute @workgroup_size(128)
fn cache(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = row_of(wg.y);
    load_key(wg.y, wg.x, lid);
    workgroupBarrier();
    norm_own_key(lid);
    rotate(GH, 1u, row.x, lid);
    workgroupBarrier();
    write_row(wg.y, wg.x, row.x, row.y, lid);
}
//#end
