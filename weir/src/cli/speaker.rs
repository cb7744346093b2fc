//! Whoever answers in a chat: a gateway.
use crate::config::Config;
use anyhow::Context;
use weir_client::{Answer, Endpoint, Message, Options, Piece, Weir};

/// How to answer, as far as flags say.
#[derive(Clone, Debug, Default)]
pub(super) struct Wishes {
    pub(super) max_tokens: Option<u32>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) seed: Option<u64>,
}

/// Answers.
pub(super) enum Speaker {
    /// The OpenAI API.
    There { weir: Weir, model: Option<String>, url: String },
}

impl Speaker {
    /// A gateway.
    pub(super) fn there(url: &str, key: Option<String>, model: Option<String>) -> Speaker {
        let mut weir = Weir::new();
        weir.add("gateway", Endpoint::gateway(url, key));
        Speaker::There { weir, model, url: url.to_owned() }
    }

    /// For a person: who answers.
    pub(super) fn describe(&self) -> String {
        match self {
            Speaker::There { model, url, .. } => {
                format!("{} at {url}", model.as_deref().unwrap_or("the first model"))
            }
        }
    }

    /// The same place, but another model.
    pub(super) async fn with_model(&self, _config: &Config, model: &str) -> anyhow::Result<Speaker> {
        match self {
            Speaker::There { weir, url, .. } => {
                Ok(Speaker::There { weir: weir.clone(), model: Some(model.to_owned()), url: url.clone() })
            }
        }
    }

    /// The next turn. Dropping the reply cancels it.
    pub(super) async fn ask(&self, messages: &[Message], wishes: &Wishes) -> anyhow::Result<Reply> {
        match self {
            Speaker::There { weir, model, .. } => {
                let options = Options {
                    model: model.clone(),
                    max_tokens: wishes.max_tokens,
                    temperature: wishes.temperature,
                    top_p: wishes.top_p,
                    seed: wishes.seed,
                    ..Options::default()
                };
                Ok(Reply::There(weir.chat(messages.to_vec(), options)?))
            }
        }
    }
}

/// An answer under way.
pub(super) enum Reply {
    There(Answer),
}

impl Reply {
    /// The next piece; after [`Piece::End`] or an error nothing more is to be expected.
    pub(super) async fn next(&mut self) -> anyhow::Result<Piece> {
        match self {
            Reply::There(answer) => Ok(answer.next().await.context("the answer has no end")??),
        }
    }
}
