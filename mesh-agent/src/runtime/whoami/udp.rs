//! The UDP side: a datagram comes back behind a line that says who answered and what it saw.

use std::io::Write as _;
use std::sync::Arc;

use tokio::net::UdpSocket;

use super::{Identity, plain_address};

/// Longest payload of an IPv4 datagram, bytes.
const DATAGRAM_BYTES_MAX: usize = 65_507;

/// Echoes for ever.
pub(super) async fn serve(socket: UdpSocket, identity: Arc<Identity>) {
    let mut received = vec![0; 65_536];
    let mut answer = Vec::with_capacity(received.len());
    loop {
        // An error is an ICMP message about an earlier answer.
        let Ok((len, client)) = socket.recv_from(&mut received).await else { continue };
        answer.clear();
        let Identity { task, node, .. } = &*identity;
        // Writing to a Vec does not fail.
        let _ = writeln!(answer, "task={task} node={node} client={}", plain_address(client));
        answer.extend_from_slice(&received[..len]);
        answer.truncate(DATAGRAM_BYTES_MAX);
        let _ = socket.send_to(&answer, client).await;
    }
}
