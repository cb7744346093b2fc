//! The made-up family as one formula, without plan, cache or program.
use super::{EPS, HEADS, LAYERS, SIZE, VOCAB};
use weir_backends::gguf::ModelFile;

/// For a whole text at once, in double precision: logits of each position.
pub fn direct(file: &ModelFile, ids: &[u32]) -> Vec<Vec<f64>> {
    let tensor = |name: &str| -> Vec<f64> {
        let info = file.tensor(name).unwrap();
        let mut bytes = vec![0; info.bytes as usize];
        file.read(info, 0..info.bytes, &mut bytes).unwrap();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
    };
    let linear = |name: &str, x: &[f64]| -> Vec<f64> {
        let (w, b) = (tensor(&format!("{name}.weight")), tensor(&format!("{name}.bias")));
        let dot = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        w.chunks(x.len()).zip(b).map(|(w, b)| dot(w) + b).collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let (w, b) = (tensor(&format!("{name}.weight")), tensor(&format!("{name}.bias")));
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / x.len() as f64;
        (0..x.len()).map(|i| (x[i] - mean) / (var + f64::from(EPS)).sqrt() * w[i] + b[i]).collect()
    };
    let rotated = |mut row: Vec<f64>, position: usize| {
        for (head, i) in (0..HEADS).flat_map(|head| (0..SIZE / 4).map(move |i| (head, i))) {
            let (sin, cos) = (position as f64 * 10_000f64.powf(-4.0 * i as f64 / SIZE as f64)).sin_cos();
            let (first, second) = (head * SIZE + i, head * SIZE + i + SIZE / 4);
            (row[first], row[second]) =
                (row[first] * cos - row[second] * sin, row[first] * sin + row[second] * cos);
        }
        row
    };
    let table = tensor("token_embd.weight");
    let hidden = table.len() / VOCAB;
    let mut xs: Vec<Vec<f64>> =
        ids.iter().map(|&id| table[id as usize * hidden..][..hidden].to_vec()).collect();
    for at in (0..LAYERS).map(|i| format!("blk.{i}")) {
        let product = |name: &str, x: &Vec<f64>| linear(&format!("{at}.{name}"), x);
        let normed: Vec<Vec<f64>> = xs.iter().map(|x| norm(&format!("{at}.attn_norm"), x)).collect();
        let turned = |name| -> Vec<Vec<f64>> {
            normed.iter().enumerate().map(|(p, x)| rotated(product(name, x), p)).collect()
        };
        let (qs, ks) = (turned("attn_q"), turned("attn_k"));
        let vs: Vec<Vec<f64>> = normed.iter().map(|x| product("attn_v", x)).collect();
        for (p, x) in xs.iter_mut().enumerate() {
            let mut attended = vec![0.0; HEADS * SIZE];
            for head in (0..HEADS * SIZE).step_by(SIZE) {
                let score = |k: &Vec<f64>| (head..head + SIZE).map(|i| qs[p][i] * k[i]).sum::<f64>();
                let weight = |k| (5.0 * (score(k) / (SIZE as f64).sqrt() / 5.0).tanh()).exp();
                let total: f64 = ks[..=p].iter().map(weight).sum();
                for (k, v) in ks.iter().zip(&vs[..=p]) {
                    (head..head + SIZE).for_each(|i| attended[i] += weight(k) / total * v[i]);
                }
            }
            let gelu =
                |u: f64| 0.5 * u * (1.0 + (0.797_884_560_802_865_4 * (u + 0.044715 * u * u * u)).tanh());
            let up = product("ffn_up", &norm(&format!("{at}.ffn_norm"), x)).into_iter().map(gelu).collect();
            let (out, down) = (product("attn_output", &attended), product("ffn_down", &up));
            (0..hidden).for_each(|i| x[i] += out[i] + down[i]);
        }
    }
    xs.iter().map(|x| linear("output", &norm("output_norm", x))).collect()
}
