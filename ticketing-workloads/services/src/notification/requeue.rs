//! `ticketing requeue-mail`: puts dead letters back into the outbox, once what was wrong is put right.

use crate::database::{DatabaseError, DatabaseSettings, Sessions, execute, query};
use crate::host::StartError;
use crate::mail_address::{redacted, redacted_address};
use std::fmt::Write;
use std::time::Duration;
use tokio_postgres::Client;
use uuid::Uuid;

/// Longest time of one batch.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Dead letters of one batch, each of which goes back as a whole.
const BATCH: i64 = 500;

/// `NULL` chooses all. The oldest first, as they will be sent; those behind the last one of the batch before.
const CHOSEN: &str = "
    SELECT d.outbox_id, d.reason, to_char(d.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI \"UTC\"'), o.booking_id, b.email
    FROM dead_letters d JOIN outbox o ON o.id = d.outbox_id JOIN bookings b ON b.id = o.booking_id
    WHERE ($1::text IS NULL OR strpos(lower(d.reason), lower($1)) > 0)
      AND ($2::double precision IS NULL OR d.created_at >= now() - $2 * interval '1 second')
      AND ($3::uuid IS NULL OR o.booking_id = $3) AND d.outbox_id > $4
    ORDER BY d.outbox_id LIMIT $5 FOR UPDATE OF d, o";

/// The reason stays with the message until it is tried. The address may have been corrected, and its time begins anew.
const REQUEUE: &str = "
    WITH taken AS (DELETE FROM dead_letters WHERE outbox_id = ANY($1) RETURNING outbox_id, reason)
    UPDATE outbox SET done_at = NULL, claim = NULL, claimed_until = NULL, next_at = now(), tries = 0, waiting_since = now(),
                      domain = COALESCE((SELECT lower(split_part(email, '@', 2)) FROM bookings WHERE id = booking_id), ''),
                      last_error = 'requeued; it was a dead letter: ' || taken.reason
    FROM taken WHERE outbox.id = taken.outbox_id";

/// Which dead letters go back, and where they are.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub database: DatabaseSettings,
    #[command(flatten)]
    pub choice: Choice,
    /// Only says what would go back.
    #[arg(long)]
    pub dry_run: bool,
}

/// Which dead letters; those that fit everything that is given.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Choice {
    /// All of them.
    #[arg(long, conflicts_with_all = ["reason", "since", "booking"])]
    pub all: bool,
    /// Those whose reason contains this, in upper or lower case.
    #[arg(long)]
    pub reason: Option<String>,
    /// Those of the last so many seconds, minutes, hours or days: 90s, 30m, 12h, 7d.
    #[arg(long, value_parser = age)]
    pub since: Option<Duration>,
    /// That of this booking.
    #[arg(long)]
    pub booking: Option<Uuid>,
}

fn age(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time such as 90s, 30m, 12h or 7d");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let count: u32 = text.strip_suffix(unit).and_then(|count| count.parse().ok()).ok_or_else(wrong)?;
    Ok(Duration::from_secs(u64::from(count) * seconds))
}

/// Why not all of them were put back.
#[derive(Debug, thiserror::Error)]
pub enum RequeueError {
    #[error(transparent)]
    Setting(#[from] StartError),
    #[error("failed to connect to the database, and nothing was put back: {0}")]
    Connect(DatabaseError),
    #[error(
        "{done} dead letter(s) went back, and perhaps up to {BATCH} more: {cause}. Run it again with --dry-run to see what is left. {HINT}"
    )]
    Database { done: usize, cause: DatabaseError },
    #[error("{done} dead letter(s) went back, and perhaps up to {BATCH} more: the database did not answer within {} s. Run it again with --dry-run to see what is left", TIMEOUT.as_secs())]
    Timeout { done: usize },
}

const HINT: &str = "If a table or a column does not exist: a service of this version brings the schema up to date";

/// Puts them back in batches; `say` gets a line for each, and how many they were.
pub async fn run(settings: &Settings, say: &mut (impl FnMut(&str) + Send)) -> Result<usize, RequeueError> {
    let connector = settings.database.connector("requeue-mail")?;
    let opened = tokio::time::timeout(TIMEOUT, connector.open()).await;
    let opened = opened.map_err(|_| RequeueError::Connect(DatabaseError::ConnectTimeout))?;
    let (client, connection) = opened.map_err(|error| RequeueError::Connect(DatabaseError::Connect(error)))?;
    let driver = tokio::spawn(connection);
    let result = requeue(&client, settings, say).await;
    driver.abort();
    result
}

async fn requeue(
    client: &Client,
    settings: &Settings,
    say: &mut (impl FnMut(&str) + Send),
) -> Result<usize, RequeueError> {
    let (mut done, mut last) = (0, None);
    loop {
        let batch = tokio::time::timeout(TIMEOUT, requeue_batch(client, settings, last.unwrap_or(i64::MIN))).await;
        let batch = batch.map_err(|_| RequeueError::Timeout { done })?;
        let (ids, text) = batch.map_err(|error| RequeueError::Database { done, cause: error.into() })?;
        done += ids.len();
        say(&text);
        last = ids.last().copied();
        if last.is_none() {
            break;
        }
    }
    say(&if settings.dry_run {
        format!("{done} dead letter(s) would go back to the outbox; nothing was changed\n")
    } else {
        format!("{done} dead letter(s) went back to the outbox\n")
    });
    Ok(done)
}

/// Those behind `after`, in a transaction of their own, which ends with the connection if it is not committed.
async fn requeue_batch(
    client: &Client,
    settings: &Settings,
    after: i64,
) -> Result<(Vec<i64>, String), tokio_postgres::Error> {
    let (sessions, choice): (Sessions, &Choice) = (settings.database.database_pooler, &settings.choice);
    client.batch_execute("BEGIN").await?;
    let seconds = choice.since.map(|since| since.as_secs_f64());
    let rows = query(client, sessions, CHOSEN, &[&choice.reason, &seconds, &choice.booking, &after, &BATCH]).await?;
    let (mut text, mut ids) = (String::new(), Vec::<i64>::with_capacity(rows.len()));
    for row in &rows {
        ids.push(row.try_get(0)?);
        let (reason, when, booking): (&str, &str, Uuid) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        let to = row.try_get::<_, Option<&str>>(4)?.map_or_else(String::new, redacted_address);
        // Versions before this one wrote addresses in full.
        let _ = writeln!(text, "{when}  booking {booking}  {to}  {}", redacted(reason));
    }
    if !settings.dry_run {
        execute(client, sessions, REQUEUE, &[&ids]).await?;
    }
    client.batch_execute("COMMIT").await?;
    Ok((ids, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    #[rstest::rstest]
    #[case("90s", Some(90))]
    #[case("30m", Some(1_800))]
    #[case("12h", Some(43_200))]
    #[case("7d", Some(604_800))]
    #[case("7", None)]
    #[case("d", None)]
    #[case("", None)]
    #[case("-1d", None)]
    #[case("1 ä", None)]
    fn ages(#[case] text: &str, #[case] seconds: Option<u64>) {
        assert_eq!(age(text).ok().map(|age| age.as_secs()), seconds);
    }

    #[rstest::rstest]
    #[case(&[], false)]
    #[case(&["--dry-run"], false)]
    #[case(&["--all"], true)]
    #[case(&["--all", "--reason", "x"], false)]
    #[case(&["--reason", "x", "--since", "2h", "--dry-run"], true)]
    #[case(&["--booking", "33333333-3333-4333-8333-333333333333"], true)]
    fn it_has_to_be_told_which(#[case] arguments: &[&str], #[case] works: bool) {
        assert_eq!(Line::try_parse_from([&["requeue-mail"], arguments].concat()).is_ok(), works);
    }
}
