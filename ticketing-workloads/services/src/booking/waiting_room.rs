//! The numbers of the waiting room, for all gateways. What happens next is decided in [`crate::waiting_room::decision`];
//! here it is read, and written over what it was decided on.
//!
//! It is called past the layers of the database: when there are more orders than their bulkhead has room for is when
//! buyers need numbers.

use super::api::Bookings;
use crate::answers::{body_unreadable, problem, unavailable};
use crate::database::{Connection, Database, DatabaseError};
use crate::schema::{self, Schema};
use crate::waiting_room::decision::Room;
use crate::waiting_room::{MAX_ARRIVALS, PATH, Report, View};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use resilience::server::read_body;
use resilience::{Priority, Resilience, priority};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use uuid::Uuid;

/// Largest report, in bytes.
const MAX_BODY_BYTES: usize = 4 * 1024;
/// Time to send one.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);
/// Time to answer one: gateways wait for 2 s.
const TIME: Duration = Duration::from_millis(1_500);
/// Tries to write over a version that others write over, too.
const TRIES: u32 = 20;
/// When a gateway may come back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

const READ: &str = "
    SELECT epoch, version, state::text, (extract(epoch FROM clock_timestamp()) * 1000)::bigint
    FROM waiting_room WHERE id = 1";
const WRITE: &str =
    "UPDATE waiting_room SET version = version + 1, state = $2::text::jsonb WHERE id = 1 AND version = $1";

/// Why a report could not be taken.
#[derive(Debug, thiserror::Error)]
enum RoomError {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error("the row of waiting_room is missing: insert it (INSERT INTO waiting_room (id) VALUES (1))")]
    NoRow,
    #[error("the state in waiting_room cannot be read ({0}): set it to '{{}}', which begins with no number drawn")]
    Unreadable(String),
    #[error("other pods wrote it {TRIES} times meanwhile")]
    Contended,
    #[error("no answer within {} ms", TIME.as_millis())]
    TimedOut,
}

impl From<tokio_postgres::Error> for RoomError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

/// What the handler works on.
struct Rooms {
    database: Arc<Database>,
    resilience: Arc<Resilience>,
    schema: Schema,
    /// One report after the other in this pod: only those of other pods are in each other's way.
    turn: Mutex<()>,
}

/// For reports of gateways.
pub fn routes(database: &Arc<Database>, resilience: &Arc<Resilience>, schema: &Schema) -> Router<Arc<Bookings>> {
    let (database, resilience) = (Arc::clone(database), Arc::clone(resilience));
    let rooms = Rooms { database, resilience, schema: schema.clone(), turn: Mutex::default() };
    Router::new().route(PATH, post(take)).with_state(Arc::new(rooms))
}

async fn take(State(rooms): State<Arc<Rooms>>, request: Request) -> Response {
    let body = match read_body(request.into_body(), MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(body) => body,
        Err(error) => return body_unreadable(error),
    };
    let invalid = |message: &str| problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", message);
    let report = match serde_json::from_slice::<Report>(&body) {
        Ok(report) if report.arrivals <= MAX_ARRIVALS => report,
        Ok(_) => return invalid(&format!("a report has at most {MAX_ARRIVALS} arrivals")),
        Err(error) => return invalid(&error.to_string()),
    };
    if !rooms.schema.has(schema::WAITING_ROOM) {
        let message = "The schema has no waiting room yet";
        return unavailable("WAITING_ROOM_UNAVAILABLE", message, RETRY_AFTER);
    }
    // Without numbers all would be told to order, when there is too much already.
    let taking = priority::within(Priority::Finish, rooms.take(&report));
    let view = tokio::time::timeout(TIME, taking).await;
    match view.unwrap_or(Err(RoomError::TimedOut)) {
        Ok(view) => Json(view).into_response(),
        Err(error) => {
            tracing::warn!(%error, "failed to give numbers of the waiting room; gateways do without for a while");
            unavailable("WAITING_ROOM_UNAVAILABLE", "The waiting room cannot be reached", RETRY_AFTER)
        }
    }
}

impl Rooms {
    async fn take(&self, report: &Report) -> Result<View, RoomError> {
        let _turn = self.turn.lock().await;
        for _ in 0..TRIES {
            let load = self.resilience.load().report().percent;
            if let Some(view) = self.database.attempt(|connection| once(connection, report, load)).await? {
                return Ok(view);
            }
        }
        Err(RoomError::Contended)
    }
}

/// `None`: somebody else was quicker.
async fn once(connection: Connection, report: &Report, own_load: u32) -> Result<Option<View>, RoomError> {
    let read = connection.prepare_cached(READ).await?;
    let row = connection.query_opt(&read, &[]).await?.ok_or(RoomError::NoRow)?;
    let (epoch, version): (Uuid, i64) = (row.try_get(0)?, row.try_get(1)?);
    let (state, now): (String, i64) = (row.try_get(2)?, row.try_get(3)?);
    let mut room: Room = serde_json::from_str(&state).map_err(|error| RoomError::Unreadable(error.to_string()))?;
    let view = room.take(now, report, own_load, epoch);
    let state = serde_json::to_string(&room).map_err(|error| RoomError::Unreadable(error.to_string()))?;
    let write = connection.prepare_cached(WRITE).await?;
    let written = connection.execute(&write, &[&version, &state]).await?;
    Ok((written == 1).then_some(view))
}
