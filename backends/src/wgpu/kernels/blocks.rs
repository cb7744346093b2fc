//! Blocks of matrices: how each format is read and multiplied.
use super::Matrix;
use crate::wgpu::pack::{Codes, Format, Scales};

/// What a matrix' blocks become in registers: codes, or eight values; then scale, minimum, and their factors.
pub(super) fn block_type(floating: bool) -> &'static str {
    if floating {
        "struct Block { lo: vec4<f32>, hi: vec4<f32> }"
    } else {
        "struct Block { lo: vec4<u32>, hi: vec4<u32>, d: f32, m: f32, s: vec4<i32> }"
    }
}

/// A function that reads block `b` of a row.
pub(super) fn load(m: &Matrix, name: &str) -> String {
    let f = m.format;
    let blocks = m.cols / f.block();
    let mut t = format!("fn {name}(row: u32, b: u32) -> Block {{ let at = row * {blocks}u + b; ");
    let codes = m.codes / 4;
    t += &match f.codes {
        Codes::F32 => format!(
            "let lo = bitcast<vec4<f32>>(w4[{codes}u + 2u * at]); let hi = bitcast<vec4<f32>>(w4[{codes}u + 2u * at + 1u]);"
        ),
        Codes::F16 => format!(
            "let v = w4[{codes}u + at]; let lo = vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y)); let hi = \
             vec4<f32>(unpack2x16float(v.z), unpack2x16float(v.w));"
        ),
        Codes::BF16 => format!(
            "let v = w4[{codes}u + at]; let lo = bitcast<vec4<f32>>(vec4<u32>(v.x << 16u, v.x & 0xffff0000u, v.y << 16u, \
             v.y & 0xffff0000u)); let hi = bitcast<vec4<f32>>(vec4<u32>(v.z << 16u, v.z & 0xffff0000u, v.w << 16u, v.w & \
             0xffff0000u));"
        ),
        Codes::N8 => format!("let lo = w4[{codes}u + 2u * at]; let hi = w4[{codes}u + 2u * at + 1u];"),
        Codes::N4 => format!(
            "let v = w4[{codes}u + at]; let lo = v & vec4<u32>(0x0f0f0f0fu); let hi = (v >> vec4<u32>(4u)) & \
             vec4<u32>(0x0f0f0f0fu);"
        ),
        Codes::N5 => format!(
            "let v = w4[{codes}u + at]; let h = w1[{}u + at]; let one = vec4<u32>(0x01010101u); let lo = (v & \
             vec4<u32>(0x0f0f0f0fu)) | (((vec4<u32>(h) >> vec4<u32>(0u, 1u, 2u, 3u)) & one) << vec4<u32>(4u)); let hi = ((v >> \
             vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | (((vec4<u32>(h) >> vec4<u32>(4u, 5u, 6u, 7u)) & one) << vec4<u32>(4u));",
            m.high
        ),
        Codes::N6 => format!(
            "let v = w4[{codes}u + at]; let h0 = w1[{0}u + 2u * at]; let h1 = w1[{0}u + 2u * at + 1u]; let three = \
             vec4<u32>(0x03030303u); let turn = vec4<u32>(0u, 2u, 4u, 6u); let lo = (v & vec4<u32>(0x0f0f0f0fu)) | \
             (((vec4<u32>(h0) >> turn) & three) << vec4<u32>(4u)); let hi = ((v >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | \
             (((vec4<u32>(h1) >> turn) & three) << vec4<u32>(4u));",
            m.high
        ),
    };
    let words = f.row_words(m.cols);
    let (scales, supers) = (m.scales, m.supers);
    let byte = |at: u32| format!("i32(sb << {}u) >> 24u", 24 - 8 * at);
    let two = format!("vec4<i32>({}, {}, 0, 0)", byte(0), byte(1));
    let four = format!("vec4<i32>({}, {}, {}, {})", byte(0), byte(1), byte(2), byte(3));
    t += &match (f.scales, f.min) {
        (Scales::None, _) => "return Block(lo, hi); }".into(),
        (Scales::Half, false) => format!(
            " let d = unpack2x16float(w1[{scales}u + row * {}u + b / 2u] >> (16u * (b % 2u))).x; return Block(lo, hi, d, 0.0, \
             vec4<i32>()); }}",
            words.scales
        ),
        (Scales::Half, true) => format!(
            " let dm = unpack2x16float(w1[{scales}u + at]); return Block(lo, hi, dm.x, dm.y, vec4<i32>()); }}"
        ),
        (Scales::Byte16, true) => format!(
            " let dm = unpack2x16float(w1[{supers}u + at / 8u]); let sb = w1[{scales}u + at]; return Block(lo, hi, dm.x, dm.y, \
             {four}); }}"
        ),
        (Scales::Byte16 | Scales::Byte32, _) => format!(
            " let dm = unpack2x16float(w1[{supers}u + at / 8u]); let sb = w1[{scales}u + at / 2u] >> (16u * (b % 2u)); return \
             Block(lo, hi, dm.x, dm.y, {two}); }}"
        ),
    };
    t.push('\n');
    t
}

/// `acc +=` the product of block `w` with the activations `xa`, `xb`, `xs`.
pub(super) fn multiply(f: Format, acc: &str, w: &str) -> String {
    if f.floating() {
        let one = |half: &str, x: &str, c: char| format!("{acc} = fma({w}.{half}.{c}, {x}.{c}, {acc}); ");
        let four = |half: &str, x: &str| "xyzw".chars().map(|c| one(half, x, c)).collect::<String>();
        return four("lo", "xa") + &four("hi", "xb");
    }
    let mut t = String::from("{ let dx = bitcast<f32>(xs.x); ");
    if f.zero != 0 || f.min {
        t += "let x0 = i32(xs.y << 16u) >> 16u; let x1 = i32(xs.y) >> 16u; ";
    }
    let zero = f.zero;
    let less = |sum: &str| if zero == 0 { String::new() } else { format!(" - {zero} * {sum}") };
    let both = format!("f32(idot({w}.lo, xa) + idot({w}.hi, xb){})", less("(x0 + x1)"));
    t += &match f.scales {
        Scales::None => String::new(),
        Scales::Half => format!("{acc} = fma({both}, {w}.d * dx, {acc}); "),
        Scales::Byte32 => format!("{acc} = fma({both}, {w}.d * f32({w}.s.x) * dx, {acc}); "),
        Scales::Byte16 => format!(
            "{acc} = fma(f32({w}.s.x * (idot({w}.lo, xa){}) + {w}.s.y * (idot({w}.hi, xb){})), {w}.d * dx, {acc}); ",
            less("x0"),
            less("x1")
        ),
    };
    t += &match (f.scales, f.min) {
        (_, false) => String::new(),
        (Scales::Byte32, _) => format!("{acc} = fma({w}.m * f32({w}.s.y), dx * f32(x0 + x1), {acc});"),
        (Scales::Byte16, _) => {
            format!("{acc} = fma({w}.m, dx * f32({w}.s.z * x0 + {w}.s.w * x1), {acc});")
        }
        _ => format!("{acc} = fma({w}.m, dx * f32(x0 + x1), {acc});"),
    };
    t + " }"
}
