//! Upstreams against a provider that misbehaves to order.
#![allow(clippy::unwrap_used)] // a test that panics has failed
mod faults;
mod mock;
mod talk;

use mock::Mock;
use serde_json::{Map, Value, json};
use std::time::Duration;
use weir_upstream::{Answer, Api, Ask, Catalog, End, Entry, Secret, Times, Upstream, UpstreamError};

/// Short, for tests.
const TIMES: Times = Times {
    connect: Duration::from_secs(2),
    first: Duration::from_millis(600),
    between: Duration::from_millis(300),
};
const KEY: &str = "sk-secret-123";

/// An upstream at the mock, described by further lines of TOML.
fn upstream(mock: &Mock, more: &str) -> Upstream {
    let models = "models = [{ name = \"m\", context = 1000, usd_per_mtok = { prompt = 1.0, output = 2.0 } }]";
    let models = if more.contains("models") { "" } else { models };
    let text = format!("name = \"mock\"\nurl = \"{}\"\nkey_env = \"MOCK_KEY\"\n{models}\n{more}", mock.url);
    let entry: Entry = toml::from_str(&text).unwrap();
    let provider = Catalog::built_in().unwrap().resolve(&entry).unwrap();
    Upstream::new(provider, Secret::new(KEY), TIMES).unwrap()
}

fn fields() -> Map<String, Value> {
    let Value::Object(fields) =
        json!({ "messages": [{ "role": "user", "content": "Why is the sky blue?" }] })
    else {
        unreachable!()
    };
    fields
}

fn ask<'a>(fields: &'a Map<String, Value>, so_far: &'a str) -> Ask<'a> {
    Ask {
        api: Api::Chat,
        fields,
        native: None,
        model: "m",
        max_tokens: 100,
        so_far,
        seed: None,
        first_by: None,
        traceparent: None,
    }
}

/// All of an answer's text, and how it ended.
async fn read(mut answer: Answer) -> (String, Result<End, UpstreamError>) {
    let mut text = String::new();
    loop {
        match answer.next().await {
            Ok(Some(piece)) => text.push_str(&piece.text),
            Ok(None) => return (text, Ok(answer.end())),
            Err(error) => return (text, Err(error)),
        }
    }
}
