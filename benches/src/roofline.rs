//! What a perfect program would reach on this machine: the yardstick beside every measurement.
use crate::machine::Ceilings;
use crate::workload::{PREFILL, STREAMS, Workload};
use anyhow::{Context as _, Result};
use weir_backends::gguf::ModelFile;
use weir_backends::plan::{Linear, Plan, Step};

/// What one step of decoding costs at least.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Bytes of weights that are read, as the file stores them.
    pub weight_bytes: u64,
    /// Multiplications by weights, one token.
    pub weights: u64,
    /// Fused steps, each of which ends with a synchronisation.
    pub steps: u64,
}

/// Reached share of read bandwidth that the model counts with.
const BANDWIDTH_SHARE: f64 = 0.92;

impl Cost {
    /// Of a plan: its matrices, each read once. Norms, biases and the KV cache of short contexts are left out.
    pub fn of(file: &ModelFile, plan: &Plan) -> Result<Cost> {
        let mut cost = Cost { weight_bytes: 0, weights: 0, steps: 1 };
        cost.add(file, &plan.head.linear)?;
        for step in plan.layers.iter().flatten() {
            cost.steps += 1;
            for linear in linears(step) {
                cost.add(file, linear)?;
            }
        }
        Ok(cost)
    }

    fn add(&mut self, file: &ModelFile, linear: &Linear) -> Result<()> {
        let tensor = file.tensor(&linear.weight).with_context(|| format!("no tensor {}", linear.weight))?;
        self.weight_bytes += tensor.bytes;
        self.weights += (linear.rows * linear.cols) as u64;
        Ok(())
    }

    /// `weight_bytes / (0.92 * bandwidth) + steps * sync`, in seconds.
    pub fn step_seconds(&self, machine: &Ceilings) -> f64 {
        let read = self.weight_bytes as f64 / (BANDWIDTH_SHARE * machine.read_bytes_per_s);
        read + self.steps as f64 * machine.sync_s
    }

    /// Tokens a second that the model predicts; for prefill, by the integer units' peak alone.
    pub fn tokens_per_s(&self, workload: Workload, machine: &Ceilings) -> f64 {
        match workload {
            Workload::Decode => 1.0 / self.step_seconds(machine),
            Workload::Streams => {
                let compute = f64::from(STREAMS) * 2.0 * self.weights as f64 / machine.int8_ops_per_s;
                f64::from(STREAMS) / self.step_seconds(machine).max(compute)
            }
            Workload::Prefill => {
                // The head works on the last row only.
                let compute = 2.0 * self.weights as f64 / machine.int8_ops_per_s;
                f64::from(PREFILL) / (f64::from(PREFILL) * compute).max(self.step_seconds(machine))
            }
        }
    }
}

fn linears(step: &Step) -> Vec<&Linear> {
    match step {
        Step::NormQkvRopeCache(s) => vec![&s.q, &s.k, &s.v],
        Step::Attend(_) => Vec::new(),
        Step::Out(s) | Step::Down(s) => vec![&s.linear],
        Step::NormGateUpAct(s) => s.gate.iter().chain([&s.up]).collect(),
    }
}
