//! The SQL of the catalog.

use crate::database::{Connection, DatabaseError};
use serde::Serialize;
use uuid::Uuid;

const LIST: &str = "
    SELECT id, name, category, price_cents, capacity, available,
           to_char(starts_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), count(*) OVER ()
    FROM events WHERE $1::text IS NULL OR category = $1
    ORDER BY created_at, id LIMIT $2 OFFSET $3";

/// Statements that are made all the time.
pub const HOT: &[(&str, &str)] = &[("list", LIST)];

/// One page of events is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Only this category.
    pub category: Option<String>,
    /// From 1.
    pub page: u32,
    /// Events on a page.
    pub page_size: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    #[serde(rename = "eventId")]
    id: Uuid,
    name: String,
    category: String,
    price_cents: i32,
    capacity: i32,
    available: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    starts_at: Option<String>,
}

/// A page of events, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The events.
    pub events: Vec<Event>,
    /// Events on all pages; 0 beyond the last one.
    pub total: i64,
}

impl Page {
    /// About how many bytes it takes.
    pub fn weight(&self) -> usize {
        let texts: usize = self.events.iter().map(|event| event.name.len() + event.category.len()).sum();
        texts + self.events.len() * size_of::<Event>() + size_of::<Self>()
    }
}

/// Reads a page.
pub async fn list(connection: Connection, query: Query) -> Result<Page, DatabaseError> {
    let list = connection.prepare_cached(LIST).await?;
    let (limit, offset) = (i64::from(query.page_size), i64::from(query.page - 1) * i64::from(query.page_size));
    let rows = connection.query(&list, &[&query.category, &limit, &offset]).await?;
    let total = rows.first().map_or(Ok(0), |row| row.try_get(7))?;
    let event = |row: &tokio_postgres::Row| {
        Ok::<_, tokio_postgres::Error>(Event {
            id: row.try_get(0)?,
            name: row.try_get(1)?,
            category: row.try_get(2)?,
            price_cents: row.try_get(3)?,
            capacity: row.try_get(4)?,
            available: row.try_get(5)?,
            starts_at: row.try_get(6)?,
        })
    };
    Ok(Page { events: rows.iter().map(event).collect::<Result<_, _>>()?, total })
}
