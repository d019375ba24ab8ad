/* A growing string. All functions that may need memory return false if there is none. */

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct strbuf {
    char *text; /* ends with a zero, or NULL as long as nothing was added */
    size_t length;
    size_t capacity;
};

#define STRBUF_EMPTY {NULL, 0, 0}

void strbuf_free(struct strbuf *buffer)
{
    free(buffer->text);
    buffer->text = NULL;
    buffer->length = 0;
    buffer->capacity = 0;
}

/* Make room for `extra` more characters and the zero. */
bool strbuf_reserve(struct strbuf *buffer, size_t extra)
{
    if (extra > SIZE_MAX / 2 - 1 - buffer->length) {
        return false;
    }
    size_t needed = buffer->length + extra + 1;
    if (needed <= buffer->capacity) {
        return true;
    }
    size_t capacity = buffer->capacity < 32 ? 32 : buffer->capacity;
    while (capacity < needed) {
        capacity *= 2;
    }
    char *text = realloc(buffer->text, capacity);
    if (text == NULL) {
        return false;
    }
    buffer->text = text;
    buffer->capacity = capacity;
    return true;
}

bool strbuf_add(struct strbuf *buffer, const char *bytes, size_t length)
{
    if (!strbuf_reserve(buffer, length)) {
        return false;
    }
    memcpy(buffer->text + buffer->length, bytes, length);
    buffer->length += length;
    buffer->text[buffer->length] = '\0';
    return true;
}

/* Add what printf would write. */
bool strbuf_addf(struct strbuf *buffer, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (length < 0 || !strbuf_reserve(buffer, (size_t)length)) {
        return false;
    }
    va_start(arguments, format);
    vsnprintf(buffer->text + buffer->length, (size_t)length + 1, format, arguments);
    va_end(arguments);
    buffer->length += (size_t)length;
    return true;
}

/* Remove blanks at the end. */
void strbuf_trim_end(struct strbuf *buffer)
{
    while (buffer->length > 0 && strchr(" \t\r\n", buffer->text[buffer->length - 1]) != NULL) {
        buffer->length--;
    }
    if (buffer->text != NULL) {
        buffer->text[buffer->length] = '\0';
    }
}

/* Hand the text over to the caller, who frees it; the buffer is empty again. */
char *strbuf_detach(struct strbuf *buffer)
{
    if (!strbuf_reserve(buffer, 0)) {
        return NULL;
    }
    buffer->text[buffer->length] = '\0';
    char *text = buffer->text;
    buffer->text = NULL;
    buffer->length = 0;
    buffer->capacity = 0;
    return text;
}
