//! The table and the JSON that a run prints.
use crate::machine::Ceilings;
use crate::roofline::Cost;
use crate::workload::Workload;
use std::fmt::Write as _;

/// What was measured of one workload on one model.
#[derive(Clone, Debug)]
pub struct Row {
    /// The model's name.
    pub model: String,
    /// Which workload.
    pub workload: Workload,
    /// Its cost.
    pub cost: Cost,
    /// Our tokens a second, one a repetition.
    pub ours: Vec<f64>,
    /// Ours through the engine, where measured.
    pub engine: Vec<f64>,
    /// The peer's, where there is one.
    pub peer: Vec<f64>,
}

/// The median; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Medians of each ceiling.
pub fn typical(measured: &[Ceilings]) -> Ceilings {
    let of = |pick: fn(&Ceilings) -> f64| median(&measured.iter().map(pick).collect::<Vec<_>>());
    Ceilings {
        read_bytes_per_s: of(|c| c.read_bytes_per_s),
        sync_s: of(|c| c.sync_s),
        int8_ops_per_s: of(|c| c.int8_ops_per_s),
    }
}

impl Row {
    /// Ours over the peer's: the median over repetitions, each of which ran both within seconds.
    pub fn ratio(&self) -> Option<f64> {
        let ratios: Vec<f64> = self.ours.iter().zip(&self.peer).map(|(ours, peer)| ours / peer).collect();
        (!ratios.is_empty()).then(|| median(&ratios))
    }

    /// Share of the ceiling that binds: bytes a second of the read bandwidth, or operations of the integer peak.
    fn share(&self, tokens_per_s: f64, machine: &Ceilings) -> f64 {
        match self.workload {
            Workload::Decode => tokens_per_s * self.cost.weight_bytes as f64 / machine.read_bytes_per_s,
            Workload::Prefill | Workload::Streams => {
                tokens_per_s * 2.0 * self.cost.weights as f64 / machine.int8_ops_per_s
            }
        }
    }
}

/// The table, one line a row.
pub fn table(rows: &[Row], machine: &Ceilings) -> String {
    let mut out = String::new();
    let head = [
        "model",
        "workload",
        "weir tok/s",
        "min..max",
        "engine",
        "llama.cpp",
        "min..max",
        "ratio",
        "share",
        "llama.cpp",
        "roofline",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        let number =
            |values: &[f64]| if values.is_empty() { "-".into() } else { format!("{:.1}", median(values)) };
        let share = |values: &[f64]| {
            if values.is_empty() {
                "-".into()
            } else {
                format!("{:.0}%", 100.0 * row.share(median(values), machine))
            }
        };
        lines.push(vec![
            row.model.clone(),
            row.workload.name().into(),
            number(&row.ours),
            spread(&row.ours),
            number(&row.engine),
            number(&row.peer),
            spread(&row.peer),
            row.ratio().map_or("-".into(), |ratio| format!("{ratio:.2}x")),
            share(&row.ours),
            share(&row.peer),
            format!("{:.0}", row.cost.tokens_per_s(row.workload, machine)),
        ]);
    }
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    for line in &lines {
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(out, "{cell:<width$}  ");
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out
}

fn spread(values: &[f64]) -> String {
    let (least, most) = values.iter().fold((f64::MAX, 0.0_f64), |(a, b), &v| (a.min(v), b.max(v)));
    if values.is_empty() { "-".into() } else { format!("{least:.0}..{most:.0}") }
}

/// All of it for a program to read.
pub fn json(
    rows: &[Row],
    machine: &Ceilings,
    threads: usize,
    load: (Option<f64>, Option<f64>),
) -> serde_json::Value {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            serde_json::json!({
                "model": row.model,
                "workload": row.workload.name(),
                "weir_tok_s": row.ours,
                "weir_engine_tok_s": row.engine,
                "llama_cpp_tok_s": row.peer,
                "ratio": row.ratio(),
                "share_of_ceiling": row.share(median(&row.ours), machine),
                "roofline_tok_s": row.cost.tokens_per_s(row.workload, machine),
                "weight_bytes": row.cost.weight_bytes,
                "steps": row.cost.steps,
            })
        })
        .collect();
    serde_json::json!({
        "threads": threads,
        "read_bytes_per_s": machine.read_bytes_per_s,
        "sync_s": machine.sync_s,
        "int8_ops_per_s": machine.int8_ops_per_s,
        "load_before": load.0,
        "load_after": load.1,
        "rows": rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
