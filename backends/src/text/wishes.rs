//! What an answer must look like, as a client wishes it, as a grammar of the model's family.
use super::dialect::{CALL_CLOSE, CALL_OPEN, Calls, Dialect, THINK_CLOSE, THINK_OPEN};
use super::listener::Listener;
use serde_json::{Value as Json, json};
use std::fmt::Write;

/// What a client wishes an answer to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wishes {
    /// What the answer is, where it is no call.
    pub form: Form,
    /// Tools that may be called.
    pub tools: Vec<Tool>,
    /// Whether they are.
    pub choice: Choice,
    /// Several may be called at once.
    pub parallel: bool,
}

/// What an answer is.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Form {
    /// Any text.
    #[default]
    Text,
    /// JSON that fits a schema; as far as its keywords are understood, where it isn't strict.
    Schema {
        /// The schema: an object.
        schema: Json,
        /// All of it counts.
        strict: bool,
    },
}

/// A tool that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Of letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// A schema of an object.
    pub parameters: Json,
    /// All of it counts.
    pub strict: bool,
}

/// Whether tools are called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// As the model likes.
    #[default]
    Auto,
    /// At least one is.
    Required,
    /// This one is.
    Named(String),
}

/// Where a model is with its thoughts when its answer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thoughts {
    /// It has none.
    None,
    /// It may begin with some.
    Perhaps,
    /// The prompt has begun them.
    Begun,
}

impl Thoughts {
    /// In an answer to a prompt that ends with this text.
    pub fn after(dialect: Dialect, prompt: &str) -> Thoughts {
        match (dialect.thinks, prompt.trim_end().ends_with(THINK_OPEN)) {
            (false, _) => Thoughts::None,
            (true, false) => Thoughts::Perhaps,
            (true, true) => Thoughts::Begun,
        }
    }
}

impl Wishes {
    /// Whoever tells text, thoughts and calls apart in the answer; none where all of it is text.
    pub fn listener(&self, dialect: Dialect, thoughts: Thoughts) -> Option<Listener> {
        let calls = (!self.tools.is_empty()).then_some(dialect.calls);
        (calls.is_some() || thoughts != Thoughts::None).then(|| Listener::new(calls, thoughts))
    }

    /// The grammar of the answer; none where anything goes.
    pub fn grammar(&self, dialect: Dialect, thoughts: Thoughts) -> Option<String> {
        if self.form == Form::Text && self.tools.is_empty() {
            return None;
        }
        let mut grammar = String::new();
        let before = match thoughts {
            Thoughts::None => "",
            Thoughts::Perhaps => "think? nl? ",
            Thoughts::Begun => "thought nl? ",
        };
        line(&mut grammar, &format!("start: {before}answer"));
        if thoughts != Thoughts::None {
            line(&mut grammar, &format!("think: \"{THINK_OPEN}\" thought"));
            line(&mut grammar, &format!("thought[lazy]: /(.|\\n)*{}/", THINK_CLOSE.replace('/', "\\/")));
        }
        line(&mut grammar, "nl: /\\n{1,2}/");
        let other = match &self.form {
            Form::Schema { schema, strict } => {
                line(&mut grammar, &format!("json: %json {}", json_rule(schema, *strict)));
                "json"
            }
            Form::Text => "text?",
        };
        let text = self.form == Form::Text;
        match (self.tools.is_empty(), dialect.calls) {
            (true, _) => line(&mut grammar, &format!("answer: {other}")),
            (false, Calls::Bare) => self.bare(&mut grammar, other, text),
            (false, Calls::Tagged | Calls::Told) => self.tagged(&mut grammar, other, text, thoughts),
        }
        Some(grammar)
    }

    fn bare(&self, grammar: &mut String, other: &str, text: bool) {
        match self.choice {
            Choice::Auto => line(grammar, &format!("answer: {other} | call")),
            Choice::Required | Choice::Named(_) => line(grammar, "answer: call"),
        }
        if text {
            line(grammar, "text: /[^{](.|\\n)*/");
        }
        self.calls(grammar, Calls::Bare);
    }

    fn tagged(&self, grammar: &mut String, other: &str, text: bool, thoughts: Thoughts) {
        let rest = if self.parallel { format!(" (nl? \"{CALL_OPEN}\" tagged)*") } else { String::new() };
        // Text ends where a call begins: the shortest text that ends so.
        match (&self.choice, text) {
            (Choice::Auto, true) => line(grammar, &format!("answer: {other} | lead tagged{rest}")),
            (Choice::Auto, false) => {
                line(grammar, &format!("answer: {other} | \"{CALL_OPEN}\" tagged{rest}"))
            }
            (Choice::Required | Choice::Named(_), _) => {
                line(grammar, &format!("answer: \"{CALL_OPEN}\" tagged{rest}"));
            }
        }
        if text && self.choice == Choice::Auto {
            let thoughtless = if thoughts == Thoughts::Perhaps {
                format!(" & ~/{THINK_OPEN}(.|\\n)*/")
            } else {
                String::new()
            };
            line(grammar, "lead[lazy]: LEAD");
            line(grammar, &format!("LEAD: /(.|\\n)*{CALL_OPEN}/{thoughtless}"));
            line(grammar, "text: TEXT");
            line(grammar, &format!("TEXT: /(.|\\n)+/ & ~/(.|\\n)*{CALL_OPEN}(.|\\n)*/{thoughtless}"));
        }
        line(grammar, &format!("tagged: nl? call nl? \"{CALL_CLOSE}\""));
        self.calls(grammar, Calls::Tagged);
    }

    /// The calls of each tool that may be called, as JSON.
    fn calls(&self, grammar: &mut String, calls: Calls) {
        let may = |tool: &&Tool| match &self.choice {
            Choice::Named(name) => *name == tool.name,
            Choice::Auto | Choice::Required => true,
        };
        let tools: Vec<&Tool> = self.tools.iter().filter(may).collect();
        let names: Vec<String> = (0..tools.len()).map(|number| format!("call_{number}")).collect();
        line(grammar, &format!("call: {}", names.join(" | ")));
        for (number, tool) in tools.iter().enumerate() {
            let (name, arguments) = (&tool.name, calls.arguments());
            let head = format!("{{\"name\": \"{name}\", \"{arguments}\": ");
            line(grammar, &format!("call_{number}: {} args_{number} \"}}\"", Json::from(head)));
            line(grammar, &format!("args_{number}: %json {}", json_rule(&tool.parameters, tool.strict)));
        }
    }
}

fn line(grammar: &mut String, text: &str) {
    // Writing to a string can't fail.
    _ = writeln!(grammar, "{text}");
}

/// The schema, and how its JSON is spaced: as models write it, on one line, so that none can go on and on with spaces.
fn json_rule(schema: &Json, strict: bool) -> Json {
    let mut schema = schema.clone();
    if let Json::Object(fields) = &mut schema {
        let options = json!({
            "item_separator": ", ",
            "key_separator": ": ",
            "whitespace_flexible": false,
            "lenient": !strict,
            "coerce_one_of": !strict,
        });
        fields.insert("x-guidance".into(), options);
    }
    schema
}
