//! Reservations that are gone and still keep their seats.

use super::sql;
use crate::testbed::{Testbed, TestbedError};
use crate::traffic::EVENT;

/// Reserves `seats` seats, one by one as buyers do, and deletes the reservations as somebody does who tidies up by hand and
/// forgets that seats belong to them. Nobody has these seats, and nobody can buy them.
pub async fn leak_reservations(testbed: &Testbed, seats: u32) -> Result<(), TestbedError> {
    let reserve = format!(
        "with taken as (update events set available = available - {seats}, version = version + 1 \
                        where id = '{EVENT}' and available >= {seats} returning id) \
         insert into bookings (id, event_id, user_id, ticket_count, status, idempotency_key, held_until) \
         select gen_random_uuid(), taken.id, 'leaked', 1, 'Held', gen_random_uuid(), now() + interval '10 minutes' \
         from taken, generate_series(1, {seats})"
    );
    sql(testbed, &reserve).await?;
    let deleted = "with gone as (delete from bookings where user_id = 'leaked' and status = 'Held' returning 1) \
                   select count(*) from gone";
    let deleted = sql(testbed, deleted).await?;
    if deleted.trim() == seats.to_string() {
        return Ok(());
    }
    Err(TestbedError::unexpected(&format!("{seats} reservations deleted"), &deleted))
}

/// Seats that are neither free nor sold, over all events.
pub async fn leaked_seats(testbed: &Testbed) -> Result<i64, TestbedError> {
    let query = "select sum(capacity - available) - \
                 (select coalesce(sum(ticket_count), 0) from bookings where status <> 'Cancelled') from events";
    let leaked = sql(testbed, query).await?;
    leaked.trim().parse().map_err(|_| TestbedError::unexpected("a number of seats", &leaked))
}
