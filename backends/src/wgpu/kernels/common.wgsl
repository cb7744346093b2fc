// What every kernel begins with. Generated before it: SG (lanes that shuffle reliably, 1 for none).
struct Params {
    // Rows of this dispatch.
    rows: u32,
    // The first of them in the list of rows whose logits are wanted.
    base: u32,
    // Whether attention writes the keys and values of its own row.
    write: u32,
    // Spans that attention is split into.
    spans: u32,
}
@group(1) @binding(0) var<uniform> P: Params;

const NOTHING: f32 = -1e30;

// Products of sixteen pairs of signed bytes.
fn idot(w: vec4<u32>, x: vec4<u32>) -> i32 {
    return dot4I8Packed(w.x, x.x) + dot4I8Packed(w.y, x.y) + dot4I8Packed(w.z, x.z) + dot4I8Packed(w.w, x.w);
}

// 1 / the step of a block whose largest magnitude is `most`.
fn inverse_step(most: f32) -> f32 {
    return select(0.0, 127.0 / most, most > 1e-30);
}

fn quantized(v: vec4<f32>, inverse: f32) -> u32 {
    return pack4xI8(vec4<i32>(round(v * inverse)));
}

fn sum_of_bytes(q: vec4<u32>) -> i32 {
    return idot(q, vec4<u32>(0x01010101u));
}

// The step of a block and the sums of its halves.
fn block_scale(most: f32, low: i32, high: i32) -> vec2<u32> {
    return vec2<u32>(bitcast<u32>(most * (1.0 / 127.0)), (u32(low) & 0xffffu) | (u32(high) << 16u));
}

fn largest(v: vec4<f32>) -> f32 {
    let a = abs(v);
    return max(max(a.x, a.y), max(a.z, a.w));
}

// e^x for x <= 0.
fn decay(x: f32) -> f32 {
    return select(0.0, exp(max(x, -87.0)), x > -87.0);
}

fn capped(x: f32, cap: f32) -> f32 {
    return cap * tanh(clamp(x / cap, -15.0, 15.0));
}
