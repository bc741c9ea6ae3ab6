//! One question of a peer that has no session, and one answer.

use mesh_api::codec::{FrameReader, FrameWriter, JOIN_FRAME_BYTES_MAX};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::handshake::Denied;
use super::peer::SILENCE_MAX;
use super::slots::Slot;
use super::{Cause, Server, SessionError};

/// Answers by `decide`, or by what `refuse` makes of its refusal, and ends the stream.
pub(super) async fn serve<S, Q, A>(
    server: &Server,
    stream: S,
    mut slot: Slot,
    decide: impl AsyncFnOnce(Q) -> Result<A, Denied>,
    refuse: impl FnOnce(&Denied) -> A,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Send,
    Q: DeserializeOwned,
    A: Serialize,
{
    let (reading, writing) = tokio::io::split(stream);
    let mut reader = FrameReader::<_, Q>::new(reading, JOIN_FRAME_BYTES_MAX);
    let question = match slot.within(reader.next()).await {
        Ok(Ok(Some(question))) => question,
        Ok(Ok(None) | Err(_)) => return Err(server.turn_away(Cause::Message)),
        Err(cause) => return Err(server.turn_away(cause)),
    };
    drop(slot);
    let (answer, denied) = match decide(question).await {
        Ok(answer) => (answer, None),
        Err(denied) => (refuse(&denied), Some(denied)),
    };
    let mut writer = FrameWriter::new(writing);
    let say = async {
        writer.send(&answer).await?;
        writer.finish().await
    };
    let said = timeout(SILENCE_MAX, say).await.map_err(|_| SessionError::Timeout);
    match denied {
        Some(Denied { cause, message, .. }) => {
            server.refusals.count(cause);
            Err(SessionError::Refused(message))
        }
        None => Ok(said??),
    }
}
