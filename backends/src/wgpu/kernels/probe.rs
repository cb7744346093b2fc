//! Kernels that test and measure a GPU.
use super::text::{Text, shuffle};
use super::{Dialect, Kernel};

/// A test of what the other kernels rely on: a sum over `lanes` neighbours of their numbers, products of bytes, packing.
pub fn probe(dialect: Dialect) -> Kernel {
    let mut t = Text::new(dialect);
    t.buffer("out", "u32", true);
    t.line(
        "@compute @workgroup_size(256)\nfn main(@builtin(local_invocation_index) lid: u32) { var v = lid;",
    );
    t.add(&shuffle("v", dialect.lanes as usize));
    t.line("out[2u + lid] = v; if lid == 0u {");
    t.line("let a = pack4xI8(vec4<i32>(-128, 127, 7, -13)); let b = pack4xI8(vec4<i32>(3, -5, 11, 17));");
    t.line("out[0] = u32(idot(vec4<u32>(a, 0u, 0u, 0u), vec4<u32>(b, 0u, 0u, 0u))); out[1] = pack4xI8(vec4<i32>(1, 127, -1, -128)); out[0] += P.base; } }");
    t.finish("main")
}

#[cfg(not(target_family = "wasm"))]
/// Reads all of a buffer with `width` workgroups; each invocation leaves what depends on all it has read.
pub fn read(dialect: Dialect, width: usize) -> Kernel {
    let mut t = Text::new(dialect);
    t.buffer("data", "vec4<u32>", false);
    t.buffer("out", "u32", true);
    t.constants(&[("STEP", 256 * width)]);
    t.line("@compute @workgroup_size(256)\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {");
    t.line("var a = vec4<u32>(); var b = a; var c = a; var d = a; let n = arrayLength(&data);");
    t.line("for (var i = at.x; i < n; i += 4u * STEP) { a += data[i]; b += data[min(i + STEP, n - 1u)];");
    t.line("c += data[min(i + 2u * STEP, n - 1u)]; d += data[min(i + 3u * STEP, n - 1u)]; }");
    t.line("let all = a + b + c + d; out[at.x] += all.x + all.y + all.z + all.w + P.base; }");
    t.finish("main")
}
