/* A map from strings to integers: open addressing, linear probing. Keys are copied. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct entry {
    char *key; /* NULL if the slot is free */
    long value;
};

struct map {
    struct entry *entries;
    size_t capacity; /* a power of two, or 0 */
    size_t count;
};

static uint64_t hash_string(const char *text)
{
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (; *text != '\0'; text++) {
        hash = (hash ^ (unsigned char)*text) * 1099511628211u;
    }
    return hash;
}

/* The slot of `key`, or the free one where it would go; there has to be a free one. */
static struct entry *find_slot(struct entry *entries, size_t capacity, const char *key)
{
    size_t index = (size_t)hash_string(key) & (capacity - 1);
    while (entries[index].key != NULL && strcmp(entries[index].key, key) != 0) {
        index = (index + 1) & (capacity - 1);
    }
    return &entries[index];
}

static bool grow(struct map *map)
{
    size_t capacity = map->capacity == 0 ? 16 : map->capacity * 2;
    struct entry *entries = calloc(capacity, sizeof *entries);
    if (entries == NULL) {
        return false;
    }
    for (size_t i = 0; i < map->capacity; i++) {
        if (map->entries[i].key != NULL) {
            *find_slot(entries, capacity, map->entries[i].key) = map->entries[i];
        }
    }
    free(map->entries);
    map->entries = entries;
    map->capacity = capacity;
    return true;
}

/* Set the value of `key`; false if there is no memory, and then nothing has changed. */
bool map_set(struct map *map, const char *key, long value)
{
    if ((map->count + 1) * 4 > map->capacity * 3 && !grow(map)) {
        return false;
    }
    struct entry *slot = find_slot(map->entries, map->capacity, key);
    if (slot->key == NULL) {
        size_t size = strlen(key) + 1;
        char *copy = malloc(size);
        if (copy == NULL) {
            return false;
        }
        memcpy(copy, key, size);
        slot->key = copy;
        map->count++;
    }
    slot->value = value;
    return true;
}

/* Store the value of `key` in `value`; false if there is none. */
bool map_get(const struct map *map, const char *key, long *value)
{
    if (map->capacity == 0) {
        return false;
    }
    const struct entry *slot = find_slot(map->entries, map->capacity, key);
    if (slot->key == NULL) {
        return false;
    }
    *value = slot->value;
    return true;
}

/* Give back all memory; the map is empty again. */
void map_clear(struct map *map)
{
    for (size_t i = 0; i < map->capacity; i++) {
        free(map->entries[i].key);
    }
    free(map->entries);
    *map = (struct map){NULL, 0, 0};
}
