//! The form in which an answer is written: each API has its own.
use super::embeddings;
use super::error::ApiError;
use super::messages;
use super::parts::{Ending, Gathered, Said};
use super::request::{Api, Request};
use super::responses;
use super::running::{Running, Total};
use super::write::{self, Label, Writer, put};
use bytes::BytesMut;

/// Writes the events of one streamed answer.
pub(super) enum Form {
    /// Chats and plain completions.
    OpenAi {
        writer: Writer,
        include_usage: bool,
    },
    Messages(messages::Writer),
    Responses(Box<responses::Writer>),
}

/// What there is before the answer.
pub(super) struct Before<'a> {
    pub(super) request: &'a Request,
    pub(super) label: &'a Label<'a>,
    /// For each prompt, with what text its answers begin.
    pub(super) echoes: &'a [Option<String>],
    /// Of all prompts.
    pub(super) prompt_tokens: usize,
}

impl Form {
    /// Begins a stream of so many choices.
    pub(super) fn begin(before: &Before<'_>, choices: usize, out: &mut BytesMut) -> Form {
        let Before { request, label, echoes, prompt_tokens } = before;
        if request.api == Api::Messages {
            return Form::Messages(messages::Writer::begin(out, label, *prompt_tokens));
        }
        if let Some(asked) = &request.asked {
            return Form::Responses(Box::new(responses::Writer::begin(out, label, asked)));
        }
        let mut writer = Writer::of_stream(request.api, label, choices, request.include_usage);
        for choice in 0..choices {
            match (&echoes[choice / request.n], request.api) {
                (Some(prompt), Api::Completion) => {
                    writer.text(out, choice, prompt, None);
                    writer.skip(choice, prompt);
                }
                (None, Api::Completion) => {}
                _ => writer.role(out, choice),
            }
        }
        Form::OpenAi { writer, include_usage: request.include_usage }
    }

    /// More of a choice.
    pub(super) fn said(&mut self, out: &mut BytesMut, choice: usize, said: Said) {
        match self {
            Form::OpenAi { writer, .. } => writer.said(out, choice, said),
            Form::Messages(writer) => writer.said(out, said),
            Form::Responses(writer) => writer.said(out, said),
        }
    }

    /// A choice has ended.
    pub(super) fn finish(
        &mut self,
        out: &mut BytesMut,
        choice: usize,
        ending: &Ending,
        total: &Total,
        running: &Running,
    ) {
        match self {
            Form::OpenAi { writer, include_usage } => {
                let last = running.ended() && !*include_usage;
                writer.finish(out, choice, ending.name(), last.then_some(running));
            }
            Form::Messages(writer) => writer.finish(out, ending, total, running),
            Form::Responses(writer) => writer.finish(out, ending, total, running),
        }
    }

    /// All choices have ended well.
    pub(super) fn end(&mut self, out: &mut BytesMut, total: &Total, running: &Running) {
        match self {
            Form::OpenAi { writer, include_usage } => {
                if *include_usage {
                    writer.usage(out, total, running);
                }
                put(out, write::DONE);
            }
            Form::Messages(_) | Form::Responses(_) => {}
        }
    }

    /// Nothing has been written for a while.
    pub(super) fn silence(&self, out: &mut BytesMut) {
        match self {
            Form::Messages(_) => messages::Writer::silence(out),
            Form::OpenAi { .. } | Form::Responses(_) => put(out, ": keep-alive\n\n"),
        }
    }

    /// The stream ends here, and not as it should.
    pub(super) fn fail(&mut self, out: &mut BytesMut, error: &ApiError) {
        match self {
            Form::OpenAi { .. } => write::write_error(out, &error.to_json()),
            Form::Messages(_) => messages::error(out, error),
            Form::Responses(writer) => writer.fail(out, error),
        }
    }
}

/// A whole answer.
pub(super) fn whole(before: &Before<'_>, choices: &[Gathered], total: &Total, running: &Running) -> Vec<u8> {
    let Before { request, label, echoes, .. } = before;
    match (&request.asked, choices) {
        (Some(asked), [gathered]) => responses::whole(label, asked, gathered, total, running),
        (None, [gathered]) if request.api == Api::Embeddings => {
            embeddings::whole(label, gathered, total, running)
        }
        (None, [gathered]) if request.api == Api::Messages => {
            messages::whole(label, gathered, total, running)
        }
        _ => {
            let mut writer = Writer::of_whole(request.api, label, choices.len());
            for choice in 0..choices.len() {
                if let Some(prompt) = &echoes[choice / request.n] {
                    writer.skip(choice, prompt);
                }
            }
            writer.whole(choices, total, running).to_vec()
        }
    }
}
