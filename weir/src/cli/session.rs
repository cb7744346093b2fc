//! A conversation on a terminal.
use super::chat::show;
use super::ending::Heed;
use super::output::note;
use super::speaker::{Speaker, Wishes};
use super::{Interrupted, explain};
use crate::config::Config;
use anyhow::Context;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config as LineConfig, Editor};
use std::fs;
use std::path::PathBuf;
use tokio::runtime::Runtime;
use weir_client::{Message, Role};

const HELP: &str = "\
/help            this
/clear           forget the conversation, keep the instructions
/system TEXT     set the instructions; without TEXT, show them
/model NAME      go on with another model; without NAME, show who answers
/save FILE       write the conversation to FILE, as Markdown
/quit            leave (so does Ctrl-D)
Ctrl-C stops an answer; twice, it leaves.";

/// Lines of history that are kept.
const HISTORY_MAX: usize = 1000;

/// A conversation and who takes part in it.
struct Session<'a> {
    config: &'a Config,
    runtime: &'a Runtime,
    speaker: Speaker,
    messages: Vec<Message>,
    wishes: &'a Wishes,
}

/// What a line led to.
enum Next {
    Go,
    Quit,
}

/// Runs until the person leaves.
pub(super) fn run(
    config: &Config,
    runtime: &Runtime,
    speaker: Speaker,
    messages: Vec<Message>,
    wishes: &Wishes,
) -> anyhow::Result<()> {
    let history = history_file(config);
    let options = LineConfig::builder().max_history_size(HISTORY_MAX)?.auto_add_history(true).build();
    let mut editor: Editor<(), FileHistory> = Editor::with_config(options)?;
    if let Some(path) = &history {
        // there is none at first
        let _ = editor.load_history(path);
    }
    let mut session = Session { config, runtime, speaker, messages, wishes };
    note(&format!("Talking to {}. /help lists the commands.", session.speaker.describe()));
    let outcome = session.converse(&mut editor);
    if let Some(path) = &history
        && let Err(e) = editor.save_history(path)
    {
        tracing::info!("history not saved: {e}");
    }
    outcome
}

fn history_file(config: &Config) -> Option<PathBuf> {
    let cache = config.store().ok()?.cache;
    fs::create_dir_all(&cache).ok()?;
    Some(cache.join("chat_history"))
}

impl Session<'_> {
    fn converse(&mut self, editor: &mut Editor<(), FileHistory>) -> anyhow::Result<()> {
        let mut interrupted = false;
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Eof) => return Ok(()),
                Err(ReadlineError::Interrupted) if interrupted => return Err(Interrupted.into()),
                Err(ReadlineError::Interrupted) => {
                    note("Ctrl-C again leaves");
                    interrupted = true;
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            interrupted = false;
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let outcome = match line.strip_prefix('/') {
                Some(command) => self.command(command),
                None => {
                    interrupted = self.say(line);
                    Ok(Next::Go)
                }
            };
            match outcome {
                Ok(Next::Go) => {}
                Ok(Next::Quit) => return Ok(()),
                Err(error) => eprintln!("error: {}", explain(&error)),
            }
        }
    }

    /// A turn of each; whether it was interrupted. A question that got no answer is not part of the conversation.
    fn say(&mut self, text: &str) -> bool {
        self.messages.push(Message::user(text));
        let outcome = self.runtime.block_on(async {
            let reply = self.speaker.ask(&self.messages, self.wishes).await?;
            show(reply).await
        });
        match outcome {
            Ok(shown) => {
                shown.remark();
                let interrupted = shown.end.is_none();
                match shown.text.is_empty() && interrupted {
                    true => _ = self.messages.pop(),
                    false => self.messages.push(Message::assistant(shown.text)),
                }
                interrupted
            }
            Err(error) => {
                self.messages.pop();
                eprintln!("error: {}", explain(&error));
                false
            }
        }
    }

    fn command(&mut self, command: &str) -> anyhow::Result<Next> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("help" | "?", _) => eprintln!("{HELP}"),
            ("quit" | "exit" | "q", _) => return Ok(Next::Quit),
            ("clear", _) => {
                self.messages.retain(|m| m.role == Role::System);
                note("forgotten");
            }
            ("system", "") => match self.messages.iter().find(|m| m.role == Role::System) {
                Some(system) => eprintln!("{}", system.content),
                None => note("no instructions"),
            },
            ("system", text) => {
                self.messages.retain(|m| m.role != Role::System);
                self.messages.insert(0, Message::system(text));
            }
            ("model", "") => eprintln!("{}", self.speaker.describe()),
            ("model", model) => {
                let _heed = Heed::new();
                self.speaker = self.runtime.block_on(async {
                    tokio::select! {
                        _ = tokio::signal::ctrl_c() => Err(Interrupted.into()),
                        speaker = self.speaker.with_model(self.config, model) => speaker,
                    }
                })?;
                note(&format!("Talking to {}", self.speaker.describe()));
            }
            ("save", "") => anyhow::bail!("/save needs the name of a file"),
            ("save", path) => {
                fs::write(path, markdown(&self.messages)).with_context(|| path.to_owned())?;
                note(&format!("saved to {path}"));
            }
            (other, _) => anyhow::bail!("there is no command /{other}; /help lists them"),
        }
        Ok(Next::Go)
    }
}

fn markdown(messages: &[Message]) -> String {
    let title = |role| match role {
        Role::System => "Instructions",
        Role::User => "User",
        Role::Assistant => "Assistant",
    };
    messages.iter().map(|m| format!("## {}\n\n{}\n\n", title(m.role), m.content.trim())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_saved_as_markdown() {
        let messages = [Message::system("s"), Message::user("u\n"), Message::assistant("a")];
        assert_eq!(markdown(&messages), "## Instructions\n\ns\n\n## User\n\nu\n\n## Assistant\n\na\n\n");
    }
}
