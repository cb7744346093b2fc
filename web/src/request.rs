//! What a request may ask for, checked where it enters.
use serde::Deserialize;
use std::time::Duration;
use wasm_bindgen::JsError;
use weir_scheduler::{Generate, ModelId, Priority, RequestId, Sampling};

/// A request's options; the SDK's names.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Wanted {
    max_tokens: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    seed: u64,
    stop: Vec<String>,
    ignore_eos: bool,
    priority: Rank,
    deadline_ms: Option<u32>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Rank {
    Background,
    Normal,
    Interactive,
}

impl Default for Wanted {
    fn default() -> Self {
        Wanted {
            max_tokens: u32::MAX,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
            stop: Vec::new(),
            ignore_eos: false,
            priority: Rank::Interactive,
            deadline_ms: None,
        }
    }
}

/// From JSON, each number within its range.
pub fn parse(json: &str) -> Result<Wanted, JsError> {
    let wanted: Wanted = serde_json::from_str(json)?;
    let check = |name: &str, value: f32, least: f32, most: f32| {
        if (least..=most).contains(&value) {
            Ok(())
        } else {
            Err(JsError::new(&format!("{name} is {value}; it must be from {least} to {most}")))
        }
    };
    check("temperature", wanted.temperature, 0.0, 100.0)?;
    check("topP", wanted.top_p, f32::MIN_POSITIVE, 1.0)?;
    check("minP", wanted.min_p, 0.0, 1.0)?;
    check("repetitionPenalty", wanted.repetition_penalty, f32::MIN_POSITIVE, 100.0)?;
    check("frequencyPenalty", wanted.frequency_penalty, -100.0, 100.0)?;
    check("presencePenalty", wanted.presence_penalty, -100.0, 100.0)?;
    Ok(wanted)
}

impl Wanted {
    /// The engine's request.
    pub fn generate(self, request: RequestId, prompt: Vec<u32>) -> Generate {
        Generate {
            request,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                frequency_penalty: self.frequency_penalty,
                presence_penalty: self.presence_penalty,
                seed: self.seed,
                ..Sampling::default()
            },
            stop: self.stop.into_iter().filter(|stop| !stop.is_empty()).collect(),
            ignore_eos: self.ignore_eos,
            priority: match self.priority {
                Rank::Background => Priority::Background,
                Rank::Normal => Priority::Normal,
                Rank::Interactive => Priority::Interactive,
            },
            deadline: self.deadline_ms.map(|ms| Duration::from_millis(ms.into())),
            ..Generate::new(ModelId([0; 32]), prompt, self.max_tokens)
        }
    }
}
