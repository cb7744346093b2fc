//! A wire that can be cut: a UDP relay between nodes and a scheduler.
use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Relays datagrams to one address, and back; while it is cut they are lost. It ends when dropped.
pub struct Wire {
    /// What nodes dial.
    pub address: SocketAddr,
    cut: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Wire {
    /// A wire to `to`.
    ///
    /// # Panics
    /// If no socket can be opened.
    pub fn to(to: SocketAddr) -> Wire {
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").expect("a free port"));
        let address = near.local_addr().expect("it has an address");
        let (cut, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let flags = (cut.clone(), ended.clone());
        std::thread::spawn(move || {
            let mut far: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            pump(&near, &flags, |from, datagram| {
                let socket = far.entry(from).or_insert_with(|| {
                    let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").expect("a free port"));
                    let (back, near, flags) = (socket.clone(), near.clone(), flags.clone());
                    // What can't be sent is lost, as it may be on any wire.
                    std::thread::spawn(move || {
                        pump(&back, &flags, |_, datagram| _ = near.send_to(datagram, from))
                    });
                    socket
                });
                _ = socket.send_to(datagram, to);
            });
        });
        Wire { address, cut, ended }
    }

    /// Loses everything from now on, or nothing.
    pub fn cut(&self, on: bool) {
        self.cut.store(on, Ordering::Relaxed);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

type Flags = (Arc<AtomicBool>, Arc<AtomicBool>);

fn pump(socket: &UdpSocket, (cut, ended): &Flags, mut carry: impl FnMut(SocketAddr, &[u8])) {
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a time above zero");
    let mut datagram = [0; 1 << 16];
    while !ended.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut datagram)
            && !cut.load(Ordering::Relaxed)
        {
            carry(from, &datagram[..length]);
        }
    }
}
