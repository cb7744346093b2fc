//! Tells text, thoughts and tool calls apart in what a model says, piece by piece.
use super::dialect::{CALL_CLOSE, CALL_OPEN, Calls, THINK_CLOSE, THINK_OPEN};
use super::wishes::Thoughts;

/// Something that was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// More text.
    Text(String),
    /// More thoughts.
    Thought(String),
    /// A call of this tool begins.
    Call(String),
    /// More of its arguments: together they are JSON.
    Arguments(String),
}

/// Listens to one answer. [`Listener::push`] the text as it comes, then [`Listener::finish`]. What may be the beginning of a
/// tag is held back until that is known.
#[derive(Clone, Debug)]
pub struct Listener {
    calls: Option<Calls>,
    state: State,
    held: String,
    /// Something of what is being told has been told.
    told: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// Thoughts, text or a bare call may begin.
    Beginning {
        thinks: bool,
    },
    Thinking,
    Text,
    /// A call, up to its arguments.
    Head,
    Arguments(Nesting),
    /// What closes a call.
    Tail,
}

/// How deep in JSON.
#[derive(Clone, Copy, Debug, Default)]
struct Nesting {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// Goes on by a byte; true if that closes the value.
    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

/// What is known of a call's head.
enum Head {
    /// The tool's name, and bytes of the head.
    Whole(String, usize),
    Unfinished,
    No,
}

impl Listener {
    pub(super) fn new(calls: Option<Calls>, thoughts: Thoughts) -> Listener {
        let state = match thoughts {
            Thoughts::Begun => State::Thinking,
            Thoughts::Perhaps => State::Beginning { thinks: true },
            Thoughts::None => State::Beginning { thinks: false },
        };
        Listener { calls, state, held: String::new(), told: false }
    }

    /// More was said.
    pub fn push(&mut self, text: &str) -> Vec<Heard> {
        let mut heard = Vec::new();
        self.held.push_str(text);
        while !self.held.is_empty() && self.step(&mut heard) {}
        heard
    }

    /// No more comes.
    pub fn finish(&mut self) -> Vec<Heard> {
        let held = std::mem::take(&mut self.held);
        let rest = match self.state {
            State::Beginning { .. } | State::Text => Heard::Text(held),
            State::Thinking => Heard::Thought(held.trim_end().to_owned()),
            // A call that was cut before its arguments is none.
            State::Head | State::Arguments(_) | State::Tail => return Vec::new(),
        };
        match &rest {
            Heard::Text(text) | Heard::Thought(text) if text.is_empty() => Vec::new(),
            _ => vec![rest],
        }
    }

    /// Goes on with what is held; false if there has to be more.
    fn step(&mut self, heard: &mut Vec<Heard>) -> bool {
        match self.state {
            State::Beginning { thinks } => self.begin(thinks),
            State::Thinking => {
                if !self.told {
                    self.held.drain(..self.held.len() - self.held.trim_start().len());
                }
                let closed = self.until(THINK_CLOSE, Heard::Thought, heard);
                if closed {
                    self.enter(State::Beginning { thinks: false });
                }
                closed
            }
            State::Text => {
                if self.calls.is_none() || self.calls == Some(Calls::Bare) {
                    heard.push(Heard::Text(std::mem::take(&mut self.held)));
                    return false;
                }
                let opened = self.until(CALL_OPEN, Heard::Text, heard);
                if opened {
                    self.enter(State::Head);
                }
                opened
            }
            State::Head => self.head(heard),
            State::Arguments(mut nesting) => {
                let end = self.held.bytes().position(|byte| nesting.closes(byte));
                let rest = self.held.split_off(end.map_or(self.held.len(), |at| at + 1));
                heard.push(Heard::Arguments(std::mem::replace(&mut self.held, rest)));
                self.state = if end.is_some() { State::Tail } else { State::Arguments(nesting) };
                true
            }
            State::Tail => {
                let Some(at) = self.held.find(CALL_CLOSE).filter(|_| self.calls != Some(Calls::Bare)) else {
                    // Only the end of it can be a part of the tag.
                    let keep = self.held.len().saturating_sub(CALL_CLOSE.len());
                    let keep = (keep..=self.held.len()).find(|at| self.held.is_char_boundary(*at));
                    self.held.drain(..keep.unwrap_or(0));
                    return false;
                };
                self.held.drain(..at + CALL_CLOSE.len());
                self.enter(State::Text);
                true
            }
        }
    }

    fn enter(&mut self, state: State) {
        (self.state, self.told) = (state, false);
    }

    fn begin(&mut self, thinks: bool) -> bool {
        let begun = self.held.trim_start();
        if begun.is_empty() || (thinks && begun.len() < THINK_OPEN.len() && THINK_OPEN.starts_with(begun)) {
            return false;
        }
        if thinks && begun.starts_with(THINK_OPEN) {
            self.held = begun[THINK_OPEN.len()..].to_owned();
            self.enter(State::Thinking);
        } else if self.calls == Some(Calls::Bare) && begun.starts_with('{') {
            self.enter(State::Head);
        } else {
            // White space behind thoughts belongs to nobody.
            if thinks_are_over(&self.state) {
                self.held = begun.to_owned();
            }
            self.enter(State::Text);
        }
        true
    }

    /// Tells what is held up to `tag`, which is taken off, or to what may be its beginning; white space before it isn't told.
    fn until(&mut self, tag: &str, tell: fn(String) -> Heard, heard: &mut Vec<Heard>) -> bool {
        let found = self.held.find(tag);
        let certain = match found {
            Some(at) => self.held[..at].trim_end().len(),
            None => {
                let may = |at: &usize| tag.as_bytes().starts_with(&self.held.as_bytes()[*at..]);
                let from = self.held.len().saturating_sub(tag.len() - 1);
                let end = (from..self.held.len()).find(may).unwrap_or(self.held.len());
                self.held[..end].trim_end().len()
            }
        };
        let rest = self.held.split_off(found.map_or(certain, |at| at + tag.len()));
        let mut told = std::mem::replace(&mut self.held, rest);
        told.truncate(certain);
        if !told.is_empty() {
            self.told = true;
            heard.push(tell(told));
        }
        found.is_some()
    }

    fn head(&mut self, heard: &mut Vec<Heard>) -> bool {
        let calls = self.calls.unwrap_or(Calls::Tagged);
        match read_head(&self.held, calls.arguments()) {
            Head::Unfinished => false,
            Head::Whole(name, length) => {
                self.held.drain(..length);
                heard.push(Heard::Call(name));
                self.state = State::Arguments(Nesting::default());
                true
            }
            Head::No => {
                // It only looked like a call.
                let text = std::mem::take(&mut self.held);
                let tag = if calls == Calls::Bare { "" } else { CALL_OPEN };
                heard.push(Heard::Text(format!("{tag}{text}")));
                self.enter(State::Text);
                false
            }
        }
    }
}

fn thinks_are_over(state: &State) -> bool {
    matches!(state, State::Beginning { thinks: false })
}

/// `{"name": "NAME", "ARGUMENTS": ` and what follows; white space before it doesn't count.
fn read_head(text: &str, arguments: &str) -> Head {
    let begun = text.trim_start();
    let before = "{\"name\": \"";
    let Some(rest) = begun.strip_prefix(before) else {
        return if before.starts_with(begun) { Head::Unfinished } else { Head::No };
    };
    let Some((name, after)) = rest.split_once('"') else {
        return if rest.len() <= 256 { Head::Unfinished } else { Head::No };
    };
    let between = format!(", \"{arguments}\": ");
    match after.strip_prefix(between.as_str()) {
        Some("") => Head::Unfinished,
        Some(rest) if rest.starts_with('{') => Head::Whole(name.to_owned(), text.len() - rest.len()),
        None if between.starts_with(after) => Head::Unfinished,
        Some(_) | None => Head::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that is heard, texts joined, however the text was cut.
    fn check(calls: Option<Calls>, thoughts: Thoughts, text: &str, expected: &[Heard]) {
        for size in [1, 2, 3, 7, 1000] {
            let mut listener = Listener::new(calls, thoughts);
            let mut all: Vec<Heard> = Vec::new();
            let chars: Vec<char> = text.chars().collect();
            let mut heard: Vec<Heard> = chars
                .chunks(size)
                .flat_map(|piece| listener.push(&piece.iter().collect::<String>()))
                .collect();
            heard.extend(listener.finish());
            for one in heard {
                match (all.last_mut(), one) {
                    (Some(Heard::Text(before)), Heard::Text(more)) => before.push_str(&more),
                    (Some(Heard::Thought(before)), Heard::Thought(more)) => before.push_str(&more),
                    (Some(Heard::Arguments(before)), Heard::Arguments(more)) => before.push_str(&more),
                    (_, one) => all.push(one),
                }
            }
            assert_eq!(all, expected, "{text:?} by {size}");
        }
    }

    fn text(text: &str) -> Heard {
        Heard::Text(text.into())
    }

    fn thought(text: &str) -> Heard {
        Heard::Thought(text.into())
    }

    fn call(name: &str, arguments: &str) -> [Heard; 2] {
        [Heard::Call(name.into()), Heard::Arguments(arguments.into())]
    }

    #[test]
    fn thoughts() {
        use Thoughts::{Begun, None as Never, Perhaps};
        check(None, Never, "<think>a</think>b", &[text("<think>a</think>b")]);
        check(None, Perhaps, "<think>\na < b\n</think>\n\nc\n", &[thought("a < b"), text("c\n")]);
        check(None, Perhaps, "\n<think>a</thi</think>c", &[thought("a</thi"), text("c")]);
        check(None, Perhaps, "<thin air", &[text("<thin air")]);
        check(None, Begun, "\na\n</think>\n\nb", &[thought("a"), text("b")]);
        check(None, Perhaps, "<think>cut ", &[thought("cut")]);
        check(None, Perhaps, "<think>\n\n</think>\n\nb", &[text("b")]);
    }

    #[test]
    fn tagged_calls() {
        let tagged = Some(Calls::Tagged);
        let none = Thoughts::None;
        let [a, b] = call("f", r#"{"x": "}\"</tool_call>{"}"#);
        let one =
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"}\\\"</tool_call>{\"}}\n</tool_call>";
        check(tagged, none, one, &[a.clone(), b.clone()]);
        check(
            tagged,
            none,
            &format!("Hm. \n{one}\n{one}"),
            &[text("Hm."), a.clone(), b.clone(), a.clone(), b.clone()],
        );
        check(
            tagged,
            Thoughts::Perhaps,
            &format!("<think>{CALL_OPEN}</think>\n{one}"),
            &[thought(CALL_OPEN), a, b],
        );
        check(tagged, none, "a <tool_ b ", &[text("a <tool_ b ")]);
        check(tagged, none, "<tool_call>\n{\"name\": \"f\", \"argu", &[]);
        check(tagged, none, "<tool_call>no", &[text("<tool_call>no")]);
        let [c, d] = call("f", "{\"x\": [1, ");
        check(tagged, none, "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": [1, ", &[c, d]);
        check(None, none, "<tool_call>text", &[text("<tool_call>text")]);
    }

    #[test]
    fn bare_calls() {
        let bare = Some(Calls::Bare);
        let [a, b] = call("get.it", "{}");
        check(bare, Thoughts::None, "{\"name\": \"get.it\", \"parameters\": {}}", &[a, b]);
        check(bare, Thoughts::None, "Text {\"name\": \"f\"", &[text("Text {\"name\": \"f\"")]);
        check(bare, Thoughts::None, "{1}", &[text("{1}")]);
    }
}
