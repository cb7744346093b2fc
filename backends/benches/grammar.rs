//! What a grammar costs: `WEIR_TEST_MODELS=FOLDER cargo bench -p weir-backends --bench grammar`.
//!
//! For the vocabulary of each test model: the tree of its tokens, compiling a grammar (first, and when it is asked for again),
//! and the mask and the step of every token of an answer that follows it.
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use weir_backends::engine::Vocabulary;
use weir_backends::gguf::ModelFile;
use weir_backends::grammar::Grammars;
use weir_backends::text::{Calls, Choice, Dialect, Form, Special, Thoughts, Tokenizer, Tool, Wishes};

const MODELS: [&str; 3] = ["smollm2", "gemma3", "qwen2"];
/// Times that each answer is gone through.
const ROUNDS: usize = 20;

fn main() {
    let folder =
        std::env::var("WEIR_TEST_MODELS").expect("WEIR_TEST_MODELS is the folder of the test models");
    println!("| model | grammar | compile | again | mask p50 | p99 | worst | step p50 |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for model in MODELS {
        let file = ModelFile::open(&Path::new(&folder).join(format!("{model}.gguf"))).expect("a test model");
        let tokenizer = Arc::new(Tokenizer::from_gguf(&file).expect("its tokenizer"));
        let began = Instant::now();
        let mut grammars = Grammars::new(&Vocabulary::Text(tokenizer.clone())).expect("it has an end");
        let tree = began.elapsed();
        for (name, grammar, answer) in cases() {
            row(&format!("{model} (tree: {})", ms(tree)), name, &grammar, &answer, &tokenizer, &mut grammars);
        }
    }
}

fn row(model: &str, name: &str, grammar: &str, answer: &str, tokenizer: &Tokenizer, grammars: &mut Grammars) {
    let began = Instant::now();
    grammars.begin(grammar, &[]).expect("a good grammar");
    let first = began.elapsed();
    let began = Instant::now();
    grammars.begin(grammar, &[]).expect("a good grammar");
    let again = began.elapsed();
    let ids = tokenizer.encode(answer, Special::AsText);
    let (mut masks, mut steps) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut state = grammars.begin(grammar, &[]).expect("a good grammar");
        for id in &ids {
            let began = Instant::now();
            let mask = state.mask().expect("there is a mask");
            masks.push(began.elapsed());
            assert!(mask[*id as usize / 32] >> (id % 32) & 1 == 1, "{name}: {:?}", tokenizer.name(*id));
            let began = Instant::now();
            let done = state.take(*id).expect("it may come");
            steps.push(began.elapsed());
            if done {
                break;
            }
        }
    }
    masks.sort_unstable();
    steps.sort_unstable();
    println!(
        "| {model} | {name} | {} | {} | {} | {} | {} | {} |",
        ms(first),
        ms(again),
        us(masks[masks.len() / 2]),
        us(masks[masks.len() * 99 / 100]),
        us(masks[masks.len() - 1]),
        us(steps[steps.len() / 2]),
    );
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn us(time: Duration) -> String {
    format!("{:.1} us", time.as_secs_f64() * 1e6)
}

/// A grammar, and an answer that follows it.
fn cases() -> [(&'static str, String, String); 4] {
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "name": { "type": "string" },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "tags": { "type": "array", "items": { "enum": ["red", "green", "blue"] } },
            "notes": { "type": "string" },
        },
        "required": ["name", "age", "tags", "notes"],
        "additionalProperties": false,
    });
    let filled = "{\"name\": \"Ada Lovelace\", \"age\": 36, \"tags\": [\"red\", \"blue\", \"green\"], \"notes\": \"She wrote the \
                  first program, for a machine that was never built; it computed Bernoulli numbers.\"}";
    let dialect = Dialect { calls: Calls::Tagged, thinks: false };
    let tool = |name: &str| Tool { name: name.into(), parameters: schema.clone(), strict: true };
    let tools = Wishes { tools: vec![tool("find"), tool("add")], parallel: true, ..Wishes::default() };
    let form = |schema: serde_json::Value| Wishes {
        form: Form::Schema { schema, strict: true },
        ..Wishes::default()
    };
    let grammar = |wishes: &Wishes| wishes.grammar(dialect, Thoughts::None).expect("it has one");
    let call = format!("<tool_call>\n{{\"name\": \"find\", \"arguments\": {filled}}}\n</tool_call>");
    let prose = "The weather is fine today, and if you want to know more about it: just ask. It rained yesterday. \n\n\
                 - one thing\n- another (with brackets)\n";
    let required = Wishes { choice: Choice::Required, ..tools.clone() };
    let any = serde_json::json!({ "type": "object" });
    [
        ("a schema", grammar(&form(schema.clone())), filled.into()),
        ("any JSON object", grammar(&form(any)), filled.into()),
        ("a call of a tool", grammar(&required), call),
        ("text, where tools may be called", grammar(&tools), prose.into()),
    ]
}
