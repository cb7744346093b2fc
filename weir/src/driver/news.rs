//! What happens to nodes, for whoever watches.
use tokio::sync::mpsc;
use weir_scheduler::NodeView;
use weir_transport::PublicKey;

/// News that a watcher hasn't read yet, at most.
pub(super) const BACKLOG: usize = 256;
/// Watchers, at most.
const WATCHERS_MAX: usize = 64;

/// Something happened to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// It is here.
    Joined {
        /// Its name.
        name: String,
        /// Its key; the node of this process has none.
        key: Option<PublicKey>,
    },
    /// It is gone.
    Left {
        /// Its name.
        name: String,
        /// Its key.
        key: Option<PublicKey>,
        /// Why.
        reason: String,
    },
    /// It gets nothing new, or does again.
    Drained {
        /// Its name.
        name: String,
        /// Its key.
        key: Option<PublicKey>,
        /// Which of the two.
        on: bool,
    },
}

/// A connected node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    /// Its key; the node of this process has none.
    pub key: Option<PublicKey>,
    /// What the scheduler knows of it.
    pub view: NodeView,
}

/// Those who watch.
#[derive(Debug, Default)]
pub(super) struct Newsroom(Vec<mpsc::Sender<News>>);

impl Newsroom {
    pub fn add(&mut self, reader: mpsc::Sender<News>) {
        self.0.retain(|other| !other.is_closed());
        if self.0.len() < WATCHERS_MAX {
            self.0.push(reader);
        }
    }

    /// Who is gone or doesn't read gets nothing more.
    pub fn tell(&mut self, news: News) {
        self.0.retain(|reader| reader.try_send(news.clone()).is_ok());
    }
}
