//! Chat templates: from messages to the prompt that a model was trained on.
//!
//! Files carry them as Jinja2 source, written for Hugging Face's `apply_chat_template`, whose settings and extras we
//! have too: `trim_blocks`, `lstrip_blocks`, loop controls, Python's methods, `raise_exception`, `strftime_now`,
//! `tojson` in Python's formatting, and `{% generation %}`.
use super::dialect::{self, Calls, Dialect};
use super::guard::Guard;
use super::tokenizer::Tokenizer;
use super::{TextError, clock, json, nesting};
use crate::gguf::ModelFile;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use serde_json::Value as Json;
use std::fmt::Write;
#[cfg(not(target_arch = "wasm32"))]
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Bytes that a template's source may have; real ones have up to about 30,000.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// What rendering may cost, in minijinja's fuel (an instruction, or 64 bytes of text): so much ...
const FUEL: u64 = 10_000;
/// ... and so much for each value of the input (a message has three; Qwen2.5's template takes 40 a message) ...
const FUEL_PER_VALUE: usize = 128;
/// ... and one for so many bytes of its text (that template takes one for 16) ...
const BYTES_PER_FUEL: usize = 4;
/// ... but never more than this.
const FUEL_MAX: u64 = 1 << 20;
/// Rendering has a stack of its own, for values that a template nests and that minijinja walks recursively. A level
/// takes at least one and a half fuel and, as was measured, up to 600 bytes of stack.
#[cfg(not(target_arch = "wasm32"))]
const STACK_BYTES_PER_FUEL: u64 = 768;

const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const PLAIN: &str = "{% for message in messages %}\
    {{ '' if message.role == 'system' else message.role | capitalize + ': ' }}{{ message.content }}\n\n{% endfor %}\
    {% if add_generation_prompt %}Assistant:{% endif %}";

/// Renders messages into a prompt. Made once from a model file, then shared.
///
/// Templates come with model files, so they are bounded: one that runs for too long or grows too large is stopped.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    stops: &'static [&'static str],
    dialect: Dialect,
}

/// Names of templates in the environment.
const DEFAULT: &str = "chat";
const WITH_TOOLS: &str = "tools";

impl ChatTemplate {
    /// The file's template, and the one for prompts with tools where it has its own; none if it has no template.
    pub fn from_gguf(file: &ModelFile, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, TextError> {
        let source = |key| file.optional::<&str>(key).ok().flatten();
        let Some(default) = source("tokenizer.chat_template") else { return Ok(None) };
        let mut template = ChatTemplate::new(default, tokenizer)?;
        if let Some(with_tools) = source("tokenizer.chat_template.tool_use") {
            template.add(WITH_TOOLS, with_tools)?;
            template.dialect = Dialect::of(default, Some(with_tools));
        }
        Ok(Some(template))
    }

    /// For models without a template. Where the vocabulary has ChatML's tokens, that is
    /// `<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n`; else plain text, `User: ...\n\nAssistant:`, and
    /// [`ChatTemplate::stops`] keeps the model from going on with the user's next turn.
    pub fn fallback(tokenizer: &Tokenizer) -> ChatTemplate {
        let has = |name| tokenizer.id(name).is_some_and(|id| tokenizer.is_control(id));
        let (source, stops): (_, &[_]) = match has("<|im_start|>") && has("<|im_end|>") {
            true => (CHATML, &[]),
            false => (PLAIN, &["\nUser:"]),
        };
        let template = ChatTemplate::new(source, tokenizer).expect("our own templates have no syntax errors");
        ChatTemplate { stops, ..template }
    }

    /// A template from its source.
    pub fn new(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate, TextError> {
        let name = |id: Option<u32>| id.map_or_else(String::new, |id| tokenizer.name(id).to_owned());
        let mut template = ChatTemplate {
            environment: environment(),
            bos: name(tokenizer.bos()),
            eos: name(tokenizer.eos()),
            stops: &[],
            dialect: Dialect::of(source, None),
        };
        template.add(DEFAULT, source)?;
        Ok(template)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TextError> {
        if source.len() > SOURCE_BYTES_MAX {
            let why = format!("it has {} bytes, {SOURCE_BYTES_MAX} may be", source.len());
            return Err(TextError::BadTemplate(why));
        }
        let source = nesting::guarded(&without_generation_tags(source), syntax());
        let added = source.and_then(|source| self.environment.add_template_owned(name, source));
        added.map_err(|error| TextError::BadTemplate(describe(&error)))
    }

    /// Where `strftime_now` has the time from: seconds since 1970, UTC. Without it, the system's clock; browsers have
    /// none, and templates that ask for the time fail there.
    pub fn with_clock(mut self, now: fn() -> u64) -> ChatTemplate {
        self.environment.add_function("strftime_now", move |format: &str| clock::format(now(), format));
        self
    }

    /// How the model calls tools, and whether it thinks aloud.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Text that ends the model's turn though the model has no token for it.
    pub fn stops(&self) -> &[&'static str] {
        self.stops
    }

    /// The tokens of the prompt of `messages`, a list of OpenAI's chat messages, with `tools`, a list of OpenAI's tools,
    /// up to where the model's turn begins. Text parts of a message are joined by newlines, and a tool call's arguments
    /// are given to the template as an object, as templates expect. A template that doesn't know tools is given messages that
    /// tell of them in words.
    ///
    /// Control tokens come from the template alone. Where their names stand in messages or tools they are tokenized as
    /// ordinary text, so that nobody can end a turn and begin another by what they write. `tokenizer` is the one that
    /// the template was made with.
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        messages: &Json,
        tools: Option<&Json>,
    ) -> Result<Vec<u32>, TextError> {
        let guard = Guard(|text: &str| tokenizer.control_at(text));
        let mut messages = prepared(messages)?;
        let mut tools = tools.cloned();
        if self.dialect.calls == Calls::Told {
            messages = dialect::tell(messages, tools.take().as_ref());
        }
        messages.iter_mut().for_each(|message| guard.mark(message));
        tools.iter_mut().for_each(|tools| guard.mark(tools));
        let rendered = self.run(messages, tools.as_ref(), true)?;
        let (text, plain) = guard.unmark(&rendered);
        Ok(tokenizer.encode_prompt_around(&text, &plain))
    }

    /// The text of that prompt, without the care that [`ChatTemplate::prompt`] takes of what people wrote. Without
    /// `add_generation_prompt` it ends with the last message.
    pub fn render(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        self.run(prepared(messages)?, tools, add_generation_prompt)
    }

    fn run(
        &self,
        messages: Vec<Json>,
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let tools = tools.filter(|tools| tools.as_array().is_none_or(|tools| !tools.is_empty()));
        let fuel = FUEL + messages.iter().chain(tools).map(fuel).sum::<usize>() as u64;
        let job = Job { template: self, messages, tools, add_generation_prompt, fuel: fuel.min(FUEL_MAX) };
        job.run()
    }
}

/// One rendering.
struct Job<'a> {
    template: &'a ChatTemplate,
    messages: Vec<Json>,
    tools: Option<&'a Json>,
    add_generation_prompt: bool,
    fuel: u64,
}

impl Job<'_> {
    /// Renders on a stack that the fuel can't exhaust: this thread's if it has room, else one made for it. (A thread for each
    /// would take longer than all the rest of a short request.)
    #[cfg(not(target_arch = "wasm32"))]
    fn run(self) -> Result<String, TextError> {
        let stack = (1 << 20) + self.fuel * STACK_BYTES_PER_FUEL;
        let stack = stack as usize;
        let rendered = catch_unwind(AssertUnwindSafe(|| stacker::maybe_grow(stack, stack, || self.render())));
        rendered.unwrap_or_else(|_| {
            let why = format!("the template engine panicked, or a stack of {stack} bytes can't be had");
            Err(TextError::Render(why))
        })
    }

    /// There is no other stack: a template that nests values too deep ends the browser's worker.
    #[cfg(target_arch = "wasm32")]
    fn run(self) -> Result<String, TextError> {
        self.render()
    }

    fn render(self) -> Result<String, TextError> {
        let mut environment = self.template.environment.clone();
        environment.set_fuel(Some(self.fuel));
        let context = minijinja::context! {
            messages => Value::from(Serde(self.messages)),
            tools => self.tools.map(|tools| Value::from(Serde(tools))),
            documents => (),
            add_generation_prompt => self.add_generation_prompt,
            bos_token => self.template.bos.as_str(),
            eos_token => self.template.eos.as_str(),
        };
        let template = match self.tools {
            Some(_) => environment.get_template(WITH_TOOLS).or_else(|_| environment.get_template(DEFAULT)),
            None => environment.get_template(DEFAULT),
        };
        template.and_then(|template| template.render(context)).map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => {
                let why = "it ran for too long, or made too much text, for the messages it was given";
                TextError::TemplateLimit(why.into())
            }
            _ => TextError::Render(describe(&error)),
        })
    }
}

fn syntax() -> SyntaxConfig {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    syntax.expect("only the treatment of white space differs from the default")
}

/// Hugging Face's settings and extras.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    nesting::install(&mut environment);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python_method);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            let text = json::write(state, value, &json::REPR)?;
            out.write_str(&text)
                .map_err(|_| Error::new(ErrorKind::WriteFailure, "the prompt can't be written"))
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("int", int);
    environment.remove_filter("pprint"); // takes time in the cube of a value's depth
    environment.remove_global("debug"); // as does this
    environment.add_function("raise_exception", |state: &State, message: Value| -> Result<Value, Error> {
        let message = match message.as_str() {
            Some(message) => message.to_owned(),
            None => json::write(state, &message, &json::REPR)?,
        };
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    #[cfg(not(target_arch = "wasm32"))]
    environment.add_function("strftime_now", |format: &str| clock::format(clock::system(), format));
    environment
}

/// Python's methods of strings, lists and dictionaries, paid for by the text that they read and may make.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let length = |value: &Value| value.as_str().map_or(0, str::len);
    let text = length(value);
    let bytes = match (method, args) {
        ("replace", [old, new, ..]) => {
            let places =
                old.as_str().map_or(0, |old| value.as_str().map_or(0, |text| text.matches(old).count()));
            text.saturating_add(places.saturating_mul(length(new)))
        }
        ("join", [values]) => values.try_iter()?.fold(text, |sum, value| {
            // what isn't a string is written out, which minijinja charges for neither
            let written = if value.as_str().is_some() { length(&value) } else { 1 << 10 };
            sum.saturating_add(written).saturating_add(text)
        }),
        ("rsplit", [] | [_] | [_, _]) => {
            state.consume_fuel(text as u64)?;
            return rsplit(value, args.first(), args.get(1));
        }
        // values nest, and each may be written out at any width
        ("format", _) => return Err(Error::from(ErrorKind::UnknownMethod)),
        _ => args.iter().map(length).fold(text, usize::saturating_add),
    };
    state.consume_fuel(bytes as u64 / 16)?;
    let result = minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)?;
    nesting::count(state, &result)?;
    Ok(result)
}

/// `str.rsplit`: at most so many pieces are cut off, from the end.
fn rsplit(text: &Value, separator: Option<&Value>, most: Option<&Value>) -> Result<Value, Error> {
    let wrong = || Error::new(ErrorKind::InvalidOperation, "rsplit takes a text and a number");
    let text = text.as_str().ok_or_else(|| Error::from(ErrorKind::UnknownMethod))?;
    let most = match most.map(|most| most.as_i64().ok_or_else(wrong)).transpose()? {
        Some(most) if most >= 0 => most as usize,
        _ => usize::MAX - 1,
    };
    let separator = match separator.filter(|separator| !separator.is_none()) {
        Some(separator) => Some(separator.as_str().filter(|s| !s.is_empty()).ok_or_else(wrong)?),
        None => None,
    };
    let mut pieces: Vec<&str> = match separator {
        Some(separator) => text.rsplitn(most + 1, separator).collect(),
        None => {
            let mut pieces = Vec::new();
            let mut rest = text.trim();
            while !rest.is_empty() {
                let cut = if pieces.len() < most { rest.rfind(char::is_whitespace) } else { None };
                let Some(at) = cut else {
                    pieces.push(rest);
                    break;
                };
                pieces.push(rest[at..].trim_start());
                rest = rest[..at].trim_end();
            }
            pieces
        }
    };
    pieces.reverse();
    Ok(pieces.into_iter().map(Value::from).collect())
}

/// Jinja2's `int`: what is no number is 0, or what is said.
fn int(
    state: &State,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    options: Kwargs,
) -> Result<Value, Error> {
    let named = options.get::<Option<Value>>("default")?;
    let otherwise = default.or(named).unwrap_or(Value::from(0));
    minijinja::filters::int(state, value, Some(otherwise.clone()), base, options).or(Ok(otherwise))
}

/// `json.dumps` with the keyword arguments that Hugging Face passes on.
fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let separators: Option<(String, String)> = match options.get::<Option<Value>>("separators")? {
        None => None,
        Some(pair) => Some((pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string())),
    };
    let style = json::Style {
        notation: json::Notation::Json,
        indent: options.get::<Option<usize>>("indent")?,
        separators,
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    json::write(state, value, &style).map(Value::from)
}

/// The tags `{% generation %}` and `{% endgeneration %}`, which only matter in training, become an `if true`.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let body = tag.strip_prefix(['-', '+']).unwrap_or(tag).trim_start();
        let (name, with) = match body {
            _ if body.starts_with("generation") => ("generation", "if true"),
            _ if body.starts_with("endgeneration") => ("endgeneration", "endif"),
            _ => ("", ""),
        };
        let after = &body[name.len()..];
        rest = tag;
        if !name.is_empty() && after.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
            out.push_str(&tag[..tag.len() - body.len()]);
            out.push_str(with);
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Messages as templates expect them.
fn prepared(messages: &Json) -> Result<Vec<Json>, TextError> {
    let messages = messages.as_array().ok_or_else(|| TextError::Render("messages are not a list".into()))?;
    messages.iter().map(for_template).collect()
}

/// A message as templates expect it.
fn for_template(message: &Json) -> Result<Json, TextError> {
    let mut message = message.clone();
    if let Some(Json::Array(parts)) = message.get("content") {
        let text = joined(parts)?;
        message["content"] = Json::String(text);
    }
    let calls = message.get_mut("tool_calls").and_then(Json::as_array_mut);
    for call in calls.into_iter().flatten() {
        let function = if call.get("function").is_some() { &mut call["function"] } else { call };
        if let Some(Json::String(text)) = function.get("arguments")
            && let Ok(arguments @ Json::Object(_)) = serde_json::from_str(text)
        {
            function["arguments"] = arguments;
        }
    }
    Ok(message)
}

/// The text of a message's parts.
fn joined(parts: &[Json]) -> Result<String, TextError> {
    let mut text = String::new();
    for (at, part) in parts.iter().enumerate() {
        let kind = part.get("type").and_then(Json::as_str).unwrap_or("text");
        let Some(part) = part.as_str().or_else(|| part.get("text").and_then(Json::as_str)) else {
            return Err(TextError::Render(format!(
                "a message has a part of type {kind:?}; only text can be rendered"
            )));
        };
        if at > 0 {
            text.push('\n');
        }
        text.push_str(part);
    }
    Ok(text)
}

/// What a template may spend on `value`.
fn fuel(value: &Json) -> usize {
    let inside = match value {
        Json::String(text) => text.len() / BYTES_PER_FUEL,
        Json::Array(values) => values.iter().map(fuel).sum(),
        Json::Object(map) => map.iter().map(|(key, value)| key.len() / BYTES_PER_FUEL + fuel(value)).sum(),
        _ => 0,
    };
    inside + FUEL_PER_VALUE
}

/// An error for a person, with its causes and its line.
fn describe(error: &Error) -> String {
    let mut text = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    if let Some(line) = error.line() {
        let _ = write!(text, " (line {line} of the template)");
    }
    text
}
