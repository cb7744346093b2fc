//! Reads what a node says of itself.
use super::conductor::Command;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use weir_scheduler::{FromNode, NodeId};
use weir_transport::{Frame, Hello, Link, LinkError, Message, Stream, VERSION, Welcome};

/// How long a node may take to say what it is.
const GREETING: Duration = Duration::from_secs(10);
/// How often nodes send a heartbeat. The scheduler suspects them after several times as long.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// Attends to the node at the other end of `link` until the link closes. The task holds no driver alive.
pub(super) fn spawn(link: Link, node: NodeId, commands: mpsc::Sender<Command>) {
    let commands = commands.downgrade();
    tokio::spawn(async move {
        let link = Arc::new(link);
        let reason = match timeout(GREETING, greet(&link, node)).await {
            Err(_) => "it did not introduce itself".into(),
            Ok(Err(reason)) => reason,
            Ok(Ok((hello, mut control))) => {
                match listen(&link, node, &hello, &mut control, &commands).await {
                    Ok(()) => "it hung up".into(),
                    Err(reason) => reason,
                }
            }
        };
        tracing::debug!(node = node.0, "node lost: {reason}");
        link.close(&reason);
        if let Some(commands) = commands.upgrade() {
            // Without a conductor nobody needs to know.
            _ = commands.send(Command::Lost { node, reason }).await;
        }
    });
}

async fn greet(link: &Link, node: NodeId) -> Result<(Hello, Stream), String> {
    let mut control = link.accept().await.map_err(text)?;
    let frame = control.receive.next().await.map_err(text)?.ok_or("it hung up")?;
    let Message::Hello(hello) = frame.read().map_err(|e| e.to_string())? else {
        return Err(format!("its first word is a {:?} frame", frame.kind()));
    };
    let heartbeat_ms = HEARTBEAT.as_millis() as u32;
    // Sent whatever it speaks, so that it can tell its user.
    let welcome = Frame::welcome(&Welcome { version: VERSION, node: node.0, heartbeat_ms });
    control.send.send(welcome).await.map_err(text)?;
    match hello.versions.contains(&VERSION) {
        true => Ok((hello, control)),
        false => Err(format!("it speaks protocol versions {:?}, not {VERSION}", hello.versions)),
    }
}

async fn listen(
    link: &Arc<Link>,
    node: NodeId,
    hello: &Hello,
    control: &mut Stream,
    commands: &mpsc::WeakSender<Command>,
) -> Result<(), String> {
    let mut known = false;
    while let Some(frame) = control.receive.next().await.map_err(text)? {
        let command = match frame.read().map_err(|e| e.to_string())? {
            Message::Profile(profile) if !known => {
                known = true;
                let name = hello.name.as_str().into();
                Command::Connected { node, name, profile, link: link.clone() }
            }
            Message::Profile(profile) => Command::FromNode { node, from: FromNode::Profile(profile) },
            Message::Status(status) if known => Command::FromNode { node, from: FromNode::Status(status) },
            _ => return Err(format!("it sent a {:?} frame out of place", frame.kind())),
        };
        let Some(commands) = commands.upgrade() else { return Err("the scheduler has stopped".into()) };
        commands.send(command).await.map_err(|_| "the scheduler has stopped")?;
    }
    Ok(())
}

fn text(error: LinkError) -> String {
    error.to_string()
}
